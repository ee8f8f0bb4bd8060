// A launch on the emulated device: its blocks, their warps and threads, and the order in which they run. Several blocks
// are there at once, and which one goes on to its next barrier is drawn; later blocks come as earlier ones end.
//
// A fault ends the launch. Its first sentence is what `run` returns.
#pragma once

#include <algorithm>
#include <cstdio>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>

#include "fiber.h"
#include "global.h"
#include "shared.h"

namespace adrenaline::cuda::emulation {

// A place in the kernel, so that threads that wait at different ones are told apart.
struct Site {
  const char* what;
  const char* file;
  int line;

  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(what, other.what) == 0 && std::strcmp(file, other.file) == 0;
  }
};

enum class State { kReady, kAtWarp, kAtBarrier, kDone };

struct Copy {
  uint32_t to;
  const void* from;
  uint32_t size;  // bytes that are copied; the rest of kCopy is filled with zeros
  uint64_t group;
};
constexpr uint32_t kCopy = 16;

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  int index = 0;
  State state = State::kReady;
  Site site{};
  uint32_t block_epoch = 1, warp_epoch = 1;
  uint64_t warp_generation = 0;  // collectives of its warp that it has taken part in
  uint64_t committed = 0;        // groups of asynchronous copies
  uint64_t seen_atomic = 0, acquired = 0;
  std::deque<Copy> copies;

  Moment moment() const { return {index, block_epoch, warp_epoch}; }
};

// What the lanes of a warp lay down for each other. Two rounds, for some still read the last one while others are ahead.
struct Warp {
  static constexpr size_t kMost = 32;
  struct Lane {
    alignas(8) unsigned char bytes[kMost];
  };
  uint64_t generation = 0;
  int arrived = 0;
  Site site{};
  Lane lanes[2][kLanes];
};

struct Block {
  Block(int number, size_t shared_bytes, std::vector<std::unique_ptr<Thread>> its)
      : index(number), threads(std::move(its)), warps(threads.size() / kLanes),
        shared(shared_bytes, static_cast<int>(threads.size())) {}
  int index;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  SharedMemory shared;
};

class Machine {
 public:
  static constexpr int kResident = 3;
  using Threads = std::vector<std::unique_ptr<Thread>>;

  // Run `kernel` in `blocks` blocks of `threads` threads. Return what went wrong; empty if nothing did.
  std::string run(int blocks, int threads, size_t shared_bytes, uint64_t seed, const std::function<void()>& kernel) {
    ADRENALINE_CHECK(threads > 0 && threads % kLanes == 0, "a block is of whole warps");
    Machine* const before = std::exchange(current, this);
    kernel_ = &kernel;
    blocks_ = blocks;
    random_.seed(seed);
    std::vector<int> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    std::vector<std::unique_ptr<Block>> live;
    for (size_t next = 0; complaint_.empty() && (next < order.size() || !live.empty());) {
      while (live.size() < kResident && next < order.size()) {
        live.push_back(std::make_unique<Block>(order[next++], shared_bytes, take_threads(threads)));
        for (int i = 0; i < threads; ++i) start(*live.back(), i);
      }
      const size_t chosen = random_() % live.size();
      if (to_next_barrier(*live[chosen])) {
        free_.push_back(std::move(live[chosen]->threads));
        live.erase(live.begin() + chosen);
      }
    }
    current = before;
    return complaint_;
  }

  // From inside a thread: stop it for good, and the launch with it.
  void complain(const char* what) {
    const Thread& thread = *self;
    if (complaint_.empty())
      complaint_ = std::string(what) + " (block " + std::to_string(thread.block->index) + ", thread " +
                   std::to_string(thread.index) + at(thread.site) + ")";
    for (;;) self->fiber.leave();  // a trap would have ASan mark another stack than this one
  }
  void check(const char* wrong) {
    if (wrong != nullptr) complain(wrong);
  }

  int blocks() const { return blocks_; }
  uint64_t tick() { return ++now_; }
  Access access() const {
    const int threads = static_cast<int>(self->block->threads.size());
    return {self->block->index * threads + self->index, self->block->index, self->block_epoch, self->acquired};
  }

  GlobalMemory global;
  static inline Machine* current = nullptr;
  static inline Thread* self = nullptr;

 private:
  static std::string at(const Site& site) {
    if (site.what == nullptr) return "";
    const char* name = std::strrchr(site.file, '/');
    return std::string(", last at ") + site.what + " of " + (name ? name + 1 : site.file) + ":" +
           std::to_string(site.line);
  }

  // Stacks are used again by later blocks.
  Threads take_threads(int count) {
    if (!free_.empty()) {
      Threads taken = std::move(free_.back());
      free_.pop_back();
      return taken;
    }
    Threads made;
    for (int i = 0; i < count; ++i) made.push_back(std::make_unique<Thread>());
    return made;
  }

  void start(Block& block, int index) {
    Thread& t = *block.threads[index];
    t.block = &block;
    t.index = index;
    t.state = State::kReady;
    t.site = {};
    t.block_epoch = t.warp_epoch = 1;
    t.warp_generation = t.committed = t.seen_atomic = t.acquired = 0;
    t.copies.clear();
    t.fiber.prepare([](void* machine) { static_cast<Machine*>(machine)->thread_main(); }, this);
  }

  void thread_main() {
    (*kernel_)();
    self->state = State::kDone;
    for (;;) self->fiber.leave();
  }

  static bool runs(const Thread& t) {
    if (t.state == State::kAtWarp) return t.block->warps[t.index / kLanes].generation >= t.warp_generation;
    return t.state == State::kReady;
  }

  // Run the threads of a block until all wait at a barrier, and let them pass. Return whether all have ended.
  bool to_next_barrier(Block& block) {
    const size_t count = block.threads.size(), first = random_() % count;
    for (bool moved = true; moved && complaint_.empty();) {
      moved = false;
      for (size_t i = 0; i < count && complaint_.empty(); ++i) {
        Thread& t = *block.threads[(first + i) % count];
        if (!runs(t)) continue;
        moved = true;
        t.state = State::kReady;
        self = &t;
        t.fiber.enter();
      }
    }
    if (!complaint_.empty()) return true;
    size_t waiting = 0, done = 0;
    const Thread* one = nullptr;
    for (const auto& t : block.threads) {
      done += t->state == State::kDone;
      if (t->state != State::kAtBarrier) continue;
      ++waiting;
      if (one != nullptr && !(one->site == t->site)) return blame(*t, "threads of a block wait at different barriers");
      one = t.get();
    }
    if (done == count) return true;
    if (waiting != count) {
      for (const auto& t : block.threads)
        if (t->state == State::kAtWarp) return blame(*t, "a warp's threads do not all come to the same collective");
      return blame(*one, "a barrier is not reached by all threads of the block");
    }
    uint64_t acquired = 0;
    for (const auto& t : block.threads) acquired = std::max(acquired, t->acquired);
    for (const auto& t : block.threads) {
      ++t->block_epoch;
      t->acquired = acquired;
      t->state = State::kReady;
    }
    return false;
  }

  bool blame(const Thread& thread, const char* what) {
    complaint_ = std::string(what) + " (block " + std::to_string(thread.block->index) + ", thread " +
                 std::to_string(thread.index) + at(thread.site) + ")";
    return true;
  }

  const std::function<void()>* kernel_ = nullptr;
  int blocks_ = 0;
  uint64_t now_ = 0;
  std::mt19937_64 random_;
  std::string complaint_;
  std::vector<Threads> free_;
};

}  // namespace adrenaline::cuda::emulation
