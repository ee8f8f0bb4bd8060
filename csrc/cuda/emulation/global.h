// Global memory as far as the blocks of a launch meet in it. What one block writes for another is seen there only after a
// fence on both sides with an atomic between. Everything else may be written once, and not be read where it is written.
#pragma once

#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

namespace adrenaline::cuda::emulation {

// Who accesses: the thread's number in the whole launch, its block, how many barriers that has passed, and up to which
// time of the launch the thread has seen what other blocks released.
struct Access {
  int thread, block;
  uint32_t block_epoch;
  uint64_t acquired;
};

class GlobalMemory {
 public:
  static constexpr uintptr_t kWord = 4;

  // Store for other blocks. It stays with the block until it is released.
  const char* store_for_blocks(void* to, const void* from, size_t size, const Access& who) {
    for (size_t i = 0; i < size; i += kWord) {
      const uintptr_t word = reinterpret_cast<uintptr_t>(to) + i;
      Held& held = held_[word];
      if (held.block >= 0 && held.block != who.block) return "two blocks write the same word for other blocks";
      held.thread = who.thread;
      held.block = who.block;
      held.block_epoch = who.block_epoch;
      held.fenced_by = -1;
      held.released = 0;
      std::memcpy(&held.value, static_cast<const char*>(from) + i, kWord);
    }
    return nullptr;
  }

  // Load what other blocks may have stored.
  const char* load_from_blocks(const void* from, void* to, size_t size, const Access& who) const {
    for (size_t i = 0; i < size; i += kWord) {
      const auto found = held_.find(reinterpret_cast<uintptr_t>(from) + i);
      if (found == held_.end()) return "memory of other blocks is read that none of them wrote";
      const Held& held = found->second;
      if (held.block == who.block) {
        if (held.thread != who.thread && held.block_epoch == who.block_epoch)
          return "global memory is read and written by different threads of a block with no barrier between";
      } else if (held.released == 0) {
        return "what another block wrote is read, and that block has made no fence before its atomic";
      } else if (held.released > who.acquired) {
        return "what another block wrote is read with no fence after the atomic that announced it";
      }
      std::memcpy(static_cast<char*>(to) + i, &held.value, kWord);
    }
    return nullptr;
  }

  // A fence: what the thread wrote, and what others of its block wrote before a barrier, will be seen by those who see
  // what the thread announces from now on.
  void fence(const Access& who) {
    for (auto& [word, held] : held_)
      if (held.block == who.block && held.fenced_by < 0 &&
          (held.thread == who.thread || held.block_epoch < who.block_epoch))
        held.fenced_by = who.thread;
  }

  // An atomic: it announces what its thread has fenced.
  void announce(const Access& who, uint64_t now) {
    for (auto& [word, held] : held_)
      if (held.fenced_by == who.thread && held.released == 0) held.released = now;
  }

  // An announcement to another process. Whatever this launch has stored for it must be seen there by then.
  const char* announce_to_peer(const Access& who) {
    has_announced_ = true;
    for (const auto& [word, held] : held_) {
      const bool is_ours = held.block == who.block && (held.thread == who.thread || held.block_epoch < who.block_epoch);
      if (!is_ours && held.released == 0) return "an announcement does not wait for rows that another thread stores";
      if (!is_ours && held.released > who.acquired)
        return "an announcement comes with no fence after the atomic that announced rows of other blocks";
    }
    return nullptr;
  }

  const char* store_for_peer(void* to, const void* from, size_t size, const Access& who) {
    if (has_announced_) return "a row is stored after it was announced";
    return store_for_blocks(to, from, size, who);
  }

  const char* store(void* to, const void* from, size_t size, const Access& who) {
    for (size_t i = 0; i < size; i += kWord) {
      const uintptr_t word = reinterpret_cast<uintptr_t>(to) + i;
      if (!written_.emplace(word, who.thread).second) return "global memory is written twice in one launch";
      if (const auto read = read_.find(word); read != read_.end() && read->second != who.thread)
        return "global memory is written where another thread has read it in the same launch";
    }
    std::memcpy(to, from, size);
    return nullptr;
  }

  // Note that a thread reads memory which another one could write.
  const char* note_read(const void* from, size_t size, const Access& who) {
    for (size_t i = 0; i < size; i += kWord) {
      const uintptr_t word = reinterpret_cast<uintptr_t>(from) + i;
      if (written_.count(word)) return "global memory is read that was written in the same launch";
      const auto [found, is_new] = read_.emplace(word, who.thread);
      if (!is_new && found->second != who.thread) found->second = kSeveral;
    }
    return nullptr;
  }

 private:
  static constexpr int kSeveral = -2;
  struct Held {
    int thread = -1, block = -1, fenced_by = -1;
    uint32_t block_epoch = 0, value = 0;
    uint64_t released = 0;
  };
  std::unordered_map<uintptr_t, Held> held_;
  std::unordered_map<uintptr_t, int> written_, read_;
  bool has_announced_ = false;
};

}  // namespace adrenaline::cuda::emulation
