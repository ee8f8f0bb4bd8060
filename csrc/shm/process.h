// What the kernel says of another process: whether it has ended, and whether it works.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cstring>
#include <string>

namespace adrenaline::shm {

// The process at the other side of a channel, by descriptors that it has passed, for it may be in another PID namespace.
// folder: its folder of /proc; -1 if it cannot be seen from here. pidfd: -1 if it is not watched.
struct Peer {
  int folder = -1;
  int pidfd = -1;
};

// Whether the process has ended; false if it is not watched.
inline bool has_ended(const Peer& peer) {
  if (peer.pidfd < 0) return false;
  pollfd entry{peer.pidfd, POLLIN, 0};
  return poll(&entry, 1, 0) > 0;
}

// The state of a thread with this folder in `threads`, as a letter of proc(5); 0 if it is not there.
inline char state_of(int threads, const std::string& thread) {
  const int fd = openat(threads, (thread + "/stat").c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  char text[256];  // the state stands behind the name, which has up to 15 characters
  const ssize_t size = read(fd, text, sizeof(text) - 1);
  close(fd);
  if (size <= 0) return 0;
  text[size] = 0;
  const char* name_end = std::strrchr(text, ')');
  return name_end != nullptr && name_end[1] == ' ' ? name_end[2] : '\0';
}

// Whether any thread of the process runs, wants to run, or waits for a disk or for memory. A process that was stopped,
// or whose threads all sleep, does not work. One that gets no CPU does. False if it cannot be seen.
inline bool works(const Peer& peer) {
  if (peer.folder < 0) return false;
  const int folder = openat(peer.folder, "task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) return false;
  DIR* threads = fdopendir(folder);  // and closedir() closes it
  if (threads == nullptr) {
    close(folder);
    return false;
  }
  bool found = false;
  while (const dirent* entry = found ? nullptr : readdir(threads)) {
    if (entry->d_name[0] == '.') continue;
    const char state = state_of(folder, entry->d_name);
    found = state == 'R' || state == 'D';
  }
  closedir(threads);
  return found;
}

}  // namespace adrenaline::shm
