// The primitives of ../primitives.h as the emulator has them. What each does on a device is said there.
#pragma once

#include <chrono>
#include <cmath>
#include <thread>
#include <utility>

#include "machine.h"

#define ADRENALINE_DEVICE inline
#define ADRENALINE_BOTH inline
#define ADRENALINE_UNROLL
#define ADRENALINE_ROLLED

namespace adrenaline::cuda {

namespace emulation {

inline Machine& machine() { return *Machine::current; }
inline Thread& self() { return *Machine::self; }

// Lay down `mine`, wait for the other lanes of the warp, and return what all of them laid down.
template <typename T>
const Warp::Lane* gather(const T& mine, const Site& site) {
  static_assert(sizeof(T) <= Warp::kMost);
  Thread& t = self();
  t.site = site;
  Warp& warp = t.block->warps[t.index / kLanes];
  if (warp.arrived == 0) warp.site = site;
  if (!(warp.site == site)) machine().complain("a warp's threads do not all come to the same collective");
  const uint64_t round = t.warp_generation++;
  Warp::Lane* lanes = warp.lanes[round % 2];
  std::memcpy(lanes[t.index % kLanes].bytes, &mine, sizeof mine);
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    t.state = State::kAtWarp;
    t.fiber.leave();
  }
  return lanes;
}

template <typename T>
T taken(const Warp::Lane* lanes, int lane) {
  T value;
  std::memcpy(&value, lanes[lane].bytes, sizeof value);
  return value;
}

// Land the copies of all groups but the `pending` last ones.
inline void land(uint64_t pending) {
  Thread& t = self();
  while (!t.copies.empty() && t.copies.front().group + pending < t.committed) {
    const Copy copy = t.copies.front();
    t.copies.pop_front();
    unsigned char bytes[kCopy] = {};
    if (copy.size > 0) {
      machine().check(machine().global.note_read(copy.from, copy.size, machine().access()));
      std::memcpy(bytes, copy.from, copy.size);
    }
    t.block->shared.end_copy(copy.to, bytes, kCopy, t.moment());
  }
}

// A device takes no value from an address that is no multiple of its alignment.
template <typename T>
void check_aligned(uintptr_t at) {
  if (at % alignof(T)) machine().complain("an access is not aligned");
}
template <typename T>
void check_aligned(const T* at) {
  check_aligned<T>(reinterpret_cast<uintptr_t>(at));
}

}  // namespace emulation

namespace device {

namespace emu = emulation;

inline int thread_index() { return emu::self().index; }
inline int block_index() { return emu::self().block->index; }
inline int block_count() { return emu::machine().blocks(); }

inline void barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::Thread& t = emu::self();
  t.site = {"the barrier", file, line};
  t.state = emu::State::kAtBarrier;
  t.fiber.leave();
}
inline void warp_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::gather(0, {"the warp's barrier", file, line});
  ++emu::self().warp_epoch;
}
inline float shuffle_xor(float mine, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const emu::Warp::Lane* lanes = emu::gather(mine, {"the shuffle", file, line});
  return emu::taken<float>(lanes, (emu::self().index % emu::kLanes) ^ mask);
}
inline bool any(bool mine, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const emu::Warp::Lane* lanes = emu::gather(mine, {"the vote", file, line});
  bool found = false;
  for (int lane = 0; lane < emu::kLanes; ++lane) found |= emu::taken<bool>(lanes, lane);
  return found;
}

template <typename T>
T shared_load(uint32_t at) {
  emu::check_aligned<T>(at);
  T value;
  emu::machine().check(emu::self().block->shared.load(at, &value, sizeof value, emu::self().moment()));
  return value;
}
template <typename T>
void shared_store(uint32_t at, const T& value) {
  emu::check_aligned<T>(at);
  emu::machine().check(emu::self().block->shared.store(at, &value, sizeof value, emu::self().moment()));
}

struct alignas(16) Rows8 {
  uint32_t word[4];
};
inline void copy_async(uint32_t to, const void* from, bool there) {
  emu::Thread& t = emu::self();
  emu::machine().check(t.block->shared.begin_copy(to, emu::kCopy, t.moment()));
  emu::check_aligned<Rows8>(to);
  emu::check_aligned(static_cast<const Rows8*>(from));
  t.copies.push_back({to, from, there ? emu::kCopy : 0, t.committed});
}
inline void copy_commit() { ++emu::self().committed; }
inline void copy_wait(int pending) { emu::land(static_cast<uint64_t>(pending)); }

inline void load_matrices(uint32_t (&to)[4], uint32_t at, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  const Rows8 mine = shared_load<Rows8>(at);
  const emu::Warp::Lane* lanes = emu::gather(mine, {"the load of matrices", file, line});
  const int lane = emu::self().index % emu::kLanes;
  for (int m = 0; m < 4; ++m) to[m] = emu::taken<Rows8>(lanes, 8 * m + lane / 4).word[lane % 4];
}
inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t at, const char* file = __builtin_FILE(),
                                     int line = __builtin_LINE()) {
  const Rows8 mine = shared_load<Rows8>(at);
  const emu::Warp::Lane* lanes = emu::gather(mine, {"the load of matrices", file, line});
  const int lane = emu::self().index % emu::kLanes;
  for (int m = 0; m < 4; ++m) {
    uint32_t both = 0;
    for (int i = 0; i < 2; ++i) {
      const Rows8 row = emu::taken<Rows8>(lanes, 8 * m + 2 * (lane % 4) + i);
      both |= (row.word[lane / 8] >> (lane / 4 % 2 * 16) & 0xffff) << 16 * i;
    }
    to[m] = both;
  }
}

template <typename T>
T load(const T* from) {
  emu::check_aligned(from);
  return *from;
}
template <typename T>
void store(T* to, const T& value) {
  emu::check_aligned(to);
  emu::machine().check(emu::machine().global.store(to, &value, sizeof value, emu::machine().access()));
}
template <typename T>
void store_for_blocks(T* to, const T& value) {
  emu::check_aligned(to);
  emu::machine().check(emu::machine().global.store_for_blocks(to, &value, sizeof value, emu::machine().access()));
  *to = value;  // for ASan
}
template <typename T>
T load_from_blocks(const T* from) {
  emu::check_aligned(from);
  T value;
  emu::machine().check(emu::machine().global.load_from_blocks(from, &value, sizeof value, emu::machine().access()));
  return value;
}
inline void fence() {
  emu::machine().global.fence(emu::machine().access());
  emu::self().acquired = emu::self().seen_atomic;
}
inline uint32_t atomic_increment(uint32_t* counter) {
  emu::self().seen_atomic = emu::machine().tick();
  emu::machine().global.announce(emu::machine().access(), emu::self().seen_atomic);
  return (*counter)++;
}

// Other processes are real ones, which have this memory mapped.
template <typename T>
void store_for_peer(T* to, const T& value) {
  emu::check_aligned(to);
  emu::machine().check(emu::machine().global.store_for_peer(to, &value, sizeof value, emu::machine().access()));
  *to = value;
}
template <typename T>
T load_from_peer(const T* from) {
  emu::check_aligned(from);
  return *from;
}
inline void fence_system() { fence(); }
inline uint64_t load_acquire_system(const uint64_t* from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
inline void store_release_system(uint64_t* to, uint64_t value) {
  emu::machine().check(emu::machine().global.announce_to_peer(emu::machine().access()));
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
}
inline int64_t time_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}
inline void pause(int /*ns*/) { std::this_thread::yield(); }

inline float exp2(float x) { return std::exp2(x); }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// One number of 16 bits and back, rounded to nearest even. Bf16 and Half are of ../elements.h.
inline float widen_bf16(uint32_t bits) { return float_of(bits << 16); }
inline float widen_half(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float size = rest < 0x400 ? static_cast<float>(rest) / 16777216.0f : float_of((rest << 13) + (112u << 23));
  return sign ? -size : size;
}
inline uint32_t narrow_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t narrow_half(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;
  if (rest < 0x38800000)  // subnormal: the sum has the step of half's smallest numbers
    return sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f));
  return sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
}
inline uint32_t pack_bf16(float low, float high) { return narrow_bf16(low) | narrow_bf16(high) << 16; }
inline uint32_t pack_half(float low, float high) { return narrow_half(low) | narrow_half(high) << 16; }
inline uint32_t scale_bf16(uint32_t two, uint32_t factors) {
  return pack_bf16(widen_bf16(two & 0xffff) * widen_bf16(factors & 0xffff),
                   widen_bf16(two >> 16) * widen_bf16(factors >> 16));
}
inline uint32_t scale_half(uint32_t two, uint32_t factors) {
  return pack_half(widen_half(two & 0xffff) * widen_half(factors & 0xffff),
                   widen_half(two >> 16) * widen_half(factors >> 16));
}

struct Operands {
  uint32_t a[4], b[2];
};
template <typename Widen>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Widen widen, const emu::Site& site) {
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const emu::Warp::Lane* lanes = emu::gather(mine, site);
  const int lane = emu::self().index % emu::kLanes;
  for (int i = 0; i < 4; ++i) {
    const int high_row = i / 2, column = 2 * (lane % 4) + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      // Of a, word 0 has rows 0-7 and k 0-7, word 1 rows 8-15, words 2 and 3 the same for k 8-15; of b, word 0 k 0-7.
      const int quad = k % 8 / 2, shift = k % 2 * 16;
      const uint32_t x = emu::taken<Operands>(lanes, lane / 4 * 4 + quad).a[high_row + k / 8 * 2] >> shift & 0xffff;
      const uint32_t y = emu::taken<Operands>(lanes, column * 4 + quad).b[k / 8] >> shift & 0xffff;
      sum += static_cast<double>(widen(x)) * widen(y);
    }
    c[i] = static_cast<float>(sum);
  }
}
inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                          const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  multiply(c, a, b, widen_bf16, {"the product", file, line});
}
inline void multiply_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                          const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  multiply(c, a, b, widen_half, {"the product", file, line});
}

}  // namespace device
}  // namespace adrenaline::cuda
