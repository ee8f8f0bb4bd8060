// The CUDA library: the kernels, and a C interface that needs no more than addresses (vllm_adrenaline/native/cuda.py).
// Each function returns a cudaError_t. Launches allocate nothing, and synchronize nothing: they may be captured in a graph.
#include <cuda_runtime.h>

#include "instances.h"
#include "plan.h"

namespace adrenaline::cuda {
namespace {

// Blocks that a multiprocessor's registers should be enough for. Three were measured to be faster on sm_90 than two
// (docs/gpu-kernel.md); elsewhere the compiler needs more registers, and nothing was measured.
template <int kHead>
constexpr int blocks_wanted() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  return kHead <= 128 ? kMostBlocks : 2;
#else
  return 2;
#endif
}

template <typename T, typename C, int kHead>
__global__ void __launch_bounds__(kThreads, blocks_wanted<kHead>()) attend_kernel(const __grid_constant__ Call call) {
  Attention<T, C, kHead>::run(call);
}

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ Batch batch, int32_t* first_tile) {
  make_plan(batch, first_tile);
}

template <typename I>
constexpr auto kernel_of(I) {
  return attend_kernel<typename I::Element, typename I::Cache, I::kHeadSize>;
}

}  // namespace
}  // namespace adrenaline::cuda

using namespace adrenaline::cuda;

// What a kernel needs of the current device, and what fits there.
struct Resources {
  int32_t multiprocessors, stages, shared_bytes, blocks_each, registers, spilled_bytes;
};

extern "C" {

size_t adrenaline_call_bytes() { return sizeof(Call); }
int64_t adrenaline_partial_floats(int blocks, int head_size) { return partial_floats(blocks, head_size); }
int adrenaline_blocks_of(int multiprocessors, double share, int each) { return blocks_of(multiprocessors, share, each); }
const char* adrenaline_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Choose the stages: the most with which three blocks fit a multiprocessor, for some load while others attend, begin or
// end a part; else the most with which two fit, or one. To be called once for each kind, before its first launch.
int adrenaline_prepare(const Kind* kind, Resources* found) {
  int device = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&each, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  found->blocks_each = 0;
  const bool is_known = for_kind(*kind, [&](auto instance) {
    using Layout = typename decltype(instance)::Layout;
    const auto kernel = kernel_of(instance);
    cudaFuncAttributes attributes{};
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return;
    found->registers = attributes.numRegs;
    found->spilled_bytes = static_cast<int32_t>(attributes.localSizeBytes);
    // L1 is wanted for little more than block tables.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return;
    for (int wanted = kMostBlocks; wanted > 0; --wanted)
      for (int stages = kMostStages; stages >= kLeastStages; --stages) {
        if (Layout::bytes(stages) > each) continue;
        found->stages = stages;
        found->shared_bytes = Layout::bytes(stages);
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, found->shared_bytes);
        if (error == cudaSuccess)
          error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found->blocks_each, kernel, kThreads,
                                                                found->shared_bytes);
        if (error != cudaSuccess || found->blocks_each >= wanted) return;
      }
  });
  if (error != cudaSuccess) return error;
  return is_known && found->blocks_each > 0 ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

// Fill first_tile [R + 1] for the step that `call` is of.
int adrenaline_plan(const Call* call, int32_t* first_tile, cudaStream_t stream) {
  plan_kernel<<<1, kPlanThreads, kPlanShared, stream>>>(call->batch, first_tile);
  return cudaGetLastError();
}

int adrenaline_attend(const Call* call, const Kind* kind, int blocks, cudaStream_t stream) {
  const bool is_known = for_kind(*kind, [&](auto instance) {
    using Layout = typename decltype(instance)::Layout;
    kernel_of(instance)<<<blocks, kThreads, Layout::bytes(call->stages), stream>>>(*call);
  });
  return is_known ? cudaGetLastError() : cudaErrorInvalidDeviceFunction;
}

}  // extern "C"
