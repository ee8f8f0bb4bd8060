// Waiting for an announcement of the other process: spin, then sleep on a futex. Every wait ends.
//
// To be woken costs tens of microseconds, a round trip by spinning half of one (docs/performance.md); but a spinning
// thread keeps its core from whoever else needs it, perhaps the very process it waits for.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <ctime>

#include "process.h"

namespace adrenaline::shm {

// How a wait ended. ready: what was waited for is there. late: the deadline passed. gone: the other process ended, or
// closed the channel. ended: this end was stopped, or the other side left the step.
enum class Status : int { ready = 0, late = 1, gone = 2, ended = 3 };

constexpr int64_t kForever = INT64_MAX;
constexpr int64_t kLivenessNs = 20'000'000;  // between two looks at whether the other process lives, or works
constexpr int kIdleLooks = 2;  // a process that is seen not to work so often, one look after the other, hangs
constexpr int kPolls = 8;  // between two readings of the clock: some 0.2 us, which is how exact times are

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long to spin, learnt from how long the waits of the past took.
class Pace {
 public:
  explicit Pace(bool shared_core) : shared_(shared_core) {}

  // A core that others need is not spun on. Otherwise: twice what is expected, when that is short enough for the cost
  // of a sleep to matter.
  int64_t spin_ns() const {
    if (shared_) return 2'000;
    return expected_ns_ <= 1'000'000 ? 20'000 + 2 * expected_ns_ : 20'000;
  }

  // Learn from a wait.
  void observe(int64_t waited_ns) { expected_ns_ += (waited_ns - expected_ns_) / 8; }

 private:
  bool shared_;
  int64_t expected_ns_ = 0;
};

// Wake the other side if it sleeps. To be called after what it waits for was stored with seq_cst: either we see that it
// sleeps, or it sees what was stored. `bell` is ours, `sleeps` is the other side's. If it spins, the line that it reads
// is not written once more.
inline void ring(std::atomic<uint32_t>& bell, const std::atomic<uint32_t>& sleeps) {
  if (sleeps.load(std::memory_order_seq_cst) == 0) return;
  bell.fetch_add(1, std::memory_order_seq_cst);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell), FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

// Spin until ready() holds, `spin_ns` at most; return whether it holds. `clock` is the time when that began, as the
// caller has read it. Afterwards it is the last reading before the end: to read it once more would delay what has come.
template <typename Ready>
bool spin(Ready&& ready, int64_t spin_ns, int64_t& clock) {
  const int64_t end = clock + spin_ns;
  do {
    for (int i = 0; i < kPolls; ++i) {
      if (ready()) return true;
      cpu_pause();
    }
    clock = now_ns();
  } while (clock < end);
  return ready();
}

// How long a wait may take: until `soft`, after that as long as the other process works, and never beyond `hard`
// (nanoseconds, monotonic). What this thread overslept is added to both: it is not the other side's time.
struct Deadline {
  int64_t soft, hard;

  void add(int64_t overslept) {
    if (soft != kForever) soft += overslept;
    if (hard != kForever) hard += overslept;
  }
};

// Sleep until ready() holds: ready, late or gone. `bell` is the other side's, `sleeps` is ours. `peer` is looked at every
// kLivenessNs, if it is watched. The other side's ring() sees `sleeps`, or we see its announcement: all four accesses
// are seq_cst.
template <typename Ready>
Status sleep_until(Ready&& ready, std::atomic<uint32_t>& bell, std::atomic<uint32_t>& sleeps, Deadline& deadline,
                   const Peer& peer) {
  sleeps.store(1, std::memory_order_seq_cst);
  Status status = Status::ready;
  int idle = 0;
  for (;;) {
    const uint32_t seen = bell.load(std::memory_order_seq_cst);
    if (ready()) break;
    const int64_t now = deadline.hard == kForever ? 0 : now_ns();
    if (now >= deadline.hard) {
      status = Status::late;
      break;
    }
    if (has_ended(peer)) {
      status = ready() ? Status::ready : Status::gone;
      break;
    }
    const bool is_tried = now >= deadline.soft;
    idle = is_tried && !works(peer) ? idle + 1 : 0;
    if (idle == kIdleLooks) {
      status = ready() ? Status::ready : Status::late;
      break;
    }
    int64_t turn = deadline.hard == kForever ? kForever : deadline.hard - now;
    if (!is_tried) turn = std::min(turn, deadline.soft - now);
    if (peer.pidfd >= 0 || is_tried) turn = std::min(turn, kLivenessNs);
    timespec timeout{static_cast<time_t>(turn / 1'000'000'000), static_cast<long>(turn % 1'000'000'000)};
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell), FUTEX_WAIT, seen, turn == kForever ? nullptr : &timeout,
            nullptr, 0);
    if (deadline.hard != kForever) deadline.add(std::max<int64_t>(0, now_ns() - now - turn));
  }
  sleeps.store(0, std::memory_order_relaxed);
  return status;
}

}  // namespace adrenaline::shm
