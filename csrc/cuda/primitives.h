// What the kernels need of a device beyond C++, in namespace `device`: with CUDA bodies under nvcc, emulated ones
// elsewhere (emulation/primitives.h). Kernels touch shared memory, other blocks and the warp only through these, so the
// emulator sees every such access. Both sides have the same names:
//
//   thread_index, block_index, block_count     where this thread is
//   barrier, warp_barrier                      of a block, of a warp; all threads must come
//   shuffle_xor(x, mask)                       the x of the lane whose number differs by mask
//   any(x)                                     whether x is true in any lane
//   shared_load<T>(at), shared_store(at, x)    dynamic shared memory, by byte offset; stores of whole words
//   copy_async(to, from, there)                16 bytes from global to shared memory; zeros if not `there`
//   copy_commit, copy_wait(pending)            close a group of them; wait for all groups but the last ones (own thread)
//   load_matrices, load_matrices_transposed    ldmatrix x4: lane i says where row i % 8 of matrix i / 8 is
//   multiply_bf16, multiply_half(c, a, b)      mma.sync m16n8k16: c += a b, in the layouts of the PTX manual
//   load(p), store(p, x)                       global memory that no other thread writes, or reads, in this launch
//   store_for_blocks, load_from_blocks         global memory by which blocks talk to each other
//   fence                                      release and acquire, device-wide
//   atomic_increment(p)                        returns what was there before
//   store_for_peer, load_from_peer             rows by which processes talk to each other; 16 bytes
//   fence_system                               release and acquire, for other processes, too
//   load_acquire_system, store_release_system  announcements to and by other processes
//   time_ns, pause(ns)                         a clock; let time pass
//   exp2                                       fast, about 2 ulp
//   bits_of, float_of                          a float as bits and back
//   pack_bf16, pack_half(low, high)            two floats, rounded to nearest even, in one word
//   widen_bf16, widen_half(bits)               the float that 16 bits stand for
//   scale_bf16, scale_half(two, factors)       products of two packed pairs
//
// and macros: ADRENALINE_DEVICE and ADRENALINE_BOTH before a function for the device, or for host and device;
// ADRENALINE_UNROLL and ADRENALINE_ROLLED before a loop that must be unrolled, or must not.
#pragma once

#if defined(__CUDACC__)
#include "primitives_cuda.h"
#else
#include "emulation/primitives.h"
#endif

namespace adrenaline::cuda {

// What one load, store or copy moves at most.
struct alignas(16) Piece {
  uint32_t word[4];
};

}  // namespace adrenaline::cuda
