// The primitives of primitives.h in CUDA: PTX of sm_80, which every later architecture has too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define ADRENALINE_DEVICE __device__ __forceinline__
#define ADRENALINE_BOTH __host__ __device__ inline
#define ADRENALINE_UNROLL _Pragma("unroll")
#define ADRENALINE_ROLLED _Pragma("unroll 1")

namespace adrenaline::cuda::device {

ADRENALINE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
ADRENALINE_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
ADRENALINE_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

ADRENALINE_DEVICE void barrier() { __syncthreads(); }
ADRENALINE_DEVICE void warp_barrier() { __syncwarp(); }
ADRENALINE_DEVICE bool any(bool mine) { return __any_sync(0xffffffff, mine); }
ADRENALINE_DEVICE float shuffle_xor(float mine, int mask) { return __shfl_xor_sync(0xffffffff, mine, mask); }

extern __shared__ __align__(16) unsigned char shared_memory[];

template <typename T>
ADRENALINE_DEVICE T shared_load(uint32_t at) {
  return *reinterpret_cast<const T*>(shared_memory + at);
}
template <typename T>
ADRENALINE_DEVICE void shared_store(uint32_t at, const T& value) {
  *reinterpret_cast<T*>(shared_memory + at) = value;
}
ADRENALINE_DEVICE uint32_t shared_address(uint32_t at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory + at));
}

// Past L1: what is read once should not push out block tables.
ADRENALINE_DEVICE void copy_async(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
               : "memory");
}
ADRENALINE_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// The instruction takes a constant. No kernel has more than four stages.
ADRENALINE_DEVICE void copy_wait(int pending) {
  switch (pending) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
  }
}

ADRENALINE_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(at))
               : "memory");
}
ADRENALINE_DEVICE void load_matrices_transposed(uint32_t (&to)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(at))
               : "memory");
}

template <typename T>
ADRENALINE_DEVICE T load(const T* from) {
  return *from;
}
template <typename T>
ADRENALINE_DEVICE void store(T* to, const T& value) {
  *to = value;
}
// Pairs of floats, past L1, which other blocks' stores do not reach.
template <typename T>
ADRENALINE_DEVICE void store_for_blocks(T* to, const T& value) {
  static_assert(sizeof(T) == sizeof(float2));
  __stcg(reinterpret_cast<float2*>(to), *reinterpret_cast<const float2*>(&value));
}
template <typename T>
ADRENALINE_DEVICE T load_from_blocks(const T* from) {
  static_assert(sizeof(T) == sizeof(float2));
  const float2 found = __ldcg(reinterpret_cast<const float2*>(from));
  return *reinterpret_cast<const T*>(&found);
}
// Cheaper than __threadfence(), which is sequentially consistent.
ADRENALINE_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
ADRENALINE_DEVICE uint32_t atomic_increment(uint32_t* counter) { return atomicAdd(counter, 1u); }

template <typename T>
ADRENALINE_DEVICE void store_for_peer(T* to, const T& value) {
  *to = value;
}
// Past L1, which what other devices store does not reach.
template <typename T>
ADRENALINE_DEVICE T load_from_peer(const T* from) {
  static_assert(sizeof(T) == sizeof(uint4));
  const uint4 found = __ldcg(reinterpret_cast<const uint4*>(from));
  return *reinterpret_cast<const T*>(&found);
}
ADRENALINE_DEVICE void fence_system() { __threadfence_system(); }
ADRENALINE_DEVICE uint64_t load_acquire_system(const uint64_t* from) {
  uint64_t found;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(found) : "l"(__cvta_generic_to_global(from)) : "memory");
  return found;
}
ADRENALINE_DEVICE void store_release_system(uint64_t* to, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "l"(value) : "memory");
}
ADRENALINE_DEVICE int64_t time_ns() {
  int64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}
ADRENALINE_DEVICE void pause(int ns) { __nanosleep(ns); }

ADRENALINE_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Host code uses these two as well: conversions to fp8 are the same on both.
ADRENALINE_BOTH uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}
ADRENALINE_BOTH float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

ADRENALINE_DEVICE float widen_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
ADRENALINE_DEVICE float widen_half(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
ADRENALINE_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
ADRENALINE_DEVICE uint32_t pack_half(float low, float high) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
// bf16 has a product of its own from sm_90 on; a fused one with -0 added is the same.
ADRENALINE_DEVICE uint32_t scale_bf16(uint32_t two, uint32_t factors) {
  uint32_t scaled;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(scaled) : "r"(two), "r"(factors), "r"(0x80008000u));
  return scaled;
}
ADRENALINE_DEVICE uint32_t scale_half(uint32_t two, uint32_t factors) {
  uint32_t scaled;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(scaled) : "r"(two), "r"(factors));
  return scaled;
}

ADRENALINE_DEVICE void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
ADRENALINE_DEVICE void multiply_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace adrenaline::cuda::device
