// The shared memory of an emulated block. It knows for every word who wrote and who read it since which barrier, and what
// asynchronous copies are on their way to it. So it finds a race whichever order the threads happen to run in.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace adrenaline::cuda::emulation {

constexpr int kLanes = 32;

// Where a thread stands: barriers of its block and of its warp that it has passed. Block epochs begin at 1.
struct Moment {
  int thread = -1;
  uint32_t block_epoch = 0, warp_epoch = 0;

  int warp() const { return thread / kLanes; }
  // Whether nothing orders this access and one of another thread.
  bool races(const Moment& other) const {
    if (thread == other.thread || block_epoch != other.block_epoch) return false;
    return warp() != other.warp() || warp_epoch == other.warp_epoch;
  }
};

class SharedMemory {
 public:
  // Threads that race must be more than one word apart, so kernels write no less than a word.
  static constexpr uint32_t kWord = 4;

  SharedMemory(size_t bytes, int threads)
      : bytes_(bytes, 0xff), words_((bytes + kWord - 1) / kWord), warps_((threads + kLanes - 1) / kLanes),
        reads_(words_.size() * warps_) {}

  // Each of these returns what is wrong, or nullptr.
  const char* load(uint32_t at, void* to, size_t size, const Moment& who) {
    if (!holds(at, size)) return "shared memory is read out of bounds";
    for (size_t w = at / kWord; w <= (at + size - 1) / kWord; ++w) {
      const Word& word = words_[w];
      if (word.in_flight) return "shared memory is read before the asynchronous copy into it was waited for";
      if (word.written.thread < 0) return "shared memory is read that nobody wrote";
      if (word.written.races(who)) return "shared memory is read and written by different threads with no barrier between";
      Read& read = reads_[w * warps_ + who.warp()];
      const bool same = read.last.block_epoch == who.block_epoch && read.last.warp_epoch == who.warp_epoch;
      read.by_several = same && (read.by_several || read.last.thread != who.thread);
      read.last = who;
    }
    std::memcpy(to, &bytes_[at], size);
    return nullptr;
  }

  const char* store(uint32_t at, const void* from, size_t size, const Moment& who) {
    if (const char* wrong = may_write(at, size, who)) return wrong;
    for (size_t w = at / kWord; w < (at + size) / kWord; ++w) words_[w].written = who;
    std::memcpy(&bytes_[at], from, size);
    return nullptr;
  }

  // An asynchronous copy begins: what was there is gone, and what will be there may not be touched.
  const char* begin_copy(uint32_t at, size_t size, const Moment& who) {
    if (const char* wrong = may_write(at, size, who)) return wrong;
    for (size_t w = at / kWord; w < (at + size) / kWord; ++w) words_[w].in_flight = true;
    std::memset(&bytes_[at], 0xff, size);
    return nullptr;
  }

  // It lands, in the thread that waited for it.
  void end_copy(uint32_t at, const void* from, size_t size, const Moment& who) {
    for (size_t w = at / kWord; w < (at + size) / kWord; ++w) words_[w] = {who, false};
    std::memcpy(&bytes_[at], from, size);
  }

 private:
  struct Word {
    Moment written;
    bool in_flight = false;
  };
  // The reads of one warp since its last barrier.
  struct Read {
    Moment last;
    bool by_several = false;
  };

  bool holds(uint32_t at, size_t size) const { return at + size <= bytes_.size(); }

  const char* may_write(uint32_t at, size_t size, const Moment& who) const {
    if (!holds(at, size)) return "shared memory is written out of bounds";
    if (at % kWord || size % kWord) return "shared memory is written in parts of a word";
    for (size_t w = at / kWord; w < (at + size) / kWord; ++w) {
      if (words_[w].in_flight) return "shared memory is written while an asynchronous copy into it is under way";
      if (words_[w].written.races(who)) return "shared memory is written by different threads with no barrier between";
      for (int warp = 0; warp < warps_; ++warp) {
        const Read& read = reads_[w * warps_ + warp];
        Moment reader = read.last;
        // Of several readers in the writer's own warp one is another thread.
        if (read.by_several && reader.thread == who.thread) reader.thread = who.thread ^ 1;
        if (reader.thread >= 0 && reader.races(who))
          return "shared memory is read and written by different threads with no barrier between";
      }
    }
    return nullptr;
  }

  std::vector<unsigned char> bytes_;
  std::vector<Word> words_;
  int warps_;
  std::vector<Read> reads_;
};

}  // namespace adrenaline::cuda::emulation
