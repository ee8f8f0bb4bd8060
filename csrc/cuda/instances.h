// The kernels that are compiled: each type of message, each type of cache, each head size. Group, query length, block
// size, layout of the cache, window, cap and sinks are numbers of a call, not kernels of their own.
#pragma once

#include <type_traits>

#include "attend.h"

#define ADRENALINE_HEADS(X, T, C) X(T, C, 64) X(T, C, 96) X(T, C, 128) X(T, C, 256)

// Whoever compiles may name a few: -D'ADRENALINE_KERNELS(X)=X(Bf16,Fp8,128)'.
#if !defined(ADRENALINE_KERNELS)
#define ADRENALINE_KERNELS(X)     \
  ADRENALINE_HEADS(X, Bf16, Bf16) \
  ADRENALINE_HEADS(X, Bf16, Fp8)  \
  ADRENALINE_HEADS(X, Half, Half) \
  ADRENALINE_HEADS(X, Half, Fp8)
#endif

namespace adrenaline::cuda {

// Which kernel a call wants, as numbers that Python can say too.
struct Kind {
  int32_t is_half, is_fp8, head_size;
};

template <typename T, typename C, int kHead>
struct Instance {
  using Element = T;
  using Cache = C;
  static constexpr int kHeadSize = kHead;
  using Layout = SharedLayout<T, C, kHead>;

  static bool is(const Kind& kind) {
    return (kind.is_half != 0) == std::is_same<T, Half>::value && (kind.is_fp8 != 0) == std::is_same<C, Fp8>::value &&
           kind.head_size == kHead;
  }
};

// Call `use(Instance)` for the kernel of a kind. Return whether it is compiled.
template <typename Use>
bool for_kind(const Kind& kind, const Use& use) {
#define ADRENALINE_TRY(T, C, D)                                          \
  if (Instance<T, C, D>::is(kind)) {                                     \
    use(Instance<T, C, D>{});                                            \
    return true;                                                         \
  }
  ADRENALINE_KERNELS(ADRENALINE_TRY)
#undef ADRENALINE_TRY
  return false;
}

}  // namespace adrenaline::cuda
