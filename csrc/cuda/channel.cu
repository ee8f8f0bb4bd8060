// The kernels of a channel (channel.h), and their C interface. Each function returns a cudaError_t. Launches allocate
// nothing, and synchronize nothing: they may be captured in a graph.
#include <cuda_runtime.h>

#include "channel.h"

namespace adrenaline::cuda {
namespace {

__global__ void begin_kernel(const __grid_constant__ ChannelEnd end) { Channel::begin(end); }
__global__ void __launch_bounds__(kChannelThreads) send_kernel(const __grid_constant__ ChannelMessage message) {
  Channel::send(message);
}
__global__ void await_kernel(const __grid_constant__ ChannelEnd end, int layer, const __grid_constant__ ChannelWork work) {
  Channel::await(end, layer, work);
}
__global__ void publish_kernel(const __grid_constant__ ChannelEnd end, int layer) { Channel::publish(end, layer); }
__global__ void __launch_bounds__(kChannelThreads) take_kernel(const __grid_constant__ ChannelMessage message) {
  Channel::take(message);
}
__global__ void close_kernel(const __grid_constant__ ChannelEnd end) { Channel::close(end); }

template <typename Kernel>
cudaError_t load(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel);
}

}  // namespace
}  // namespace adrenaline::cuda

using namespace adrenaline::cuda;

extern "C" {

size_t adrenaline_channel_bytes() { return sizeof(ChannelMessage); }
size_t adrenaline_channel_state_bytes() { return sizeof(ChannelState); }

// Have the kernels loaded. CUDA loads each at its first launch, and may wait for the device then: for a kernel that
// waits for this very launch.
int adrenaline_channel_prepare() {
  for (cudaError_t error : {load(begin_kernel), load(send_kernel), load(await_kernel), load(publish_kernel),
                            load(take_kernel), load(close_kernel)})
    if (error != cudaSuccess) return error;
  return cudaSuccess;
}

int adrenaline_channel_begin(const ChannelEnd* end, cudaStream_t stream) {
  begin_kernel<<<1, 1, 0, stream>>>(*end);
  return cudaGetLastError();
}

// `blocks`: the most that the launch may have.
int adrenaline_channel_send(const ChannelMessage* message, int blocks, cudaStream_t stream) {
  send_kernel<<<channel_blocks(*message, blocks), kChannelThreads, 0, stream>>>(*message);
  return cudaGetLastError();
}

// One thread waits, and not the blocks of `take`: they would keep multiprocessors from what is waited for.
int adrenaline_channel_await(const ChannelEnd* end, int layer, const ChannelWork* work, cudaStream_t stream) {
  await_kernel<<<1, 1, 0, stream>>>(*end, layer, *work);
  return cudaGetLastError();
}

int adrenaline_channel_publish(const ChannelEnd* end, int layer, cudaStream_t stream) {
  publish_kernel<<<1, 1, 0, stream>>>(*end, layer);
  return cudaGetLastError();
}

int adrenaline_channel_take(const ChannelMessage* message, int blocks, cudaStream_t stream) {
  take_kernel<<<channel_blocks(*message, blocks), kChannelThreads, 0, stream>>>(*message);
  return cudaGetLastError();
}

int adrenaline_channel_close(const ChannelEnd* end, cudaStream_t stream) {
  close_kernel<<<1, 1, 0, stream>>>(*end);
  return cudaGetLastError();
}

}  // extern "C"
