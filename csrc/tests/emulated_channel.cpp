// The kernels of a channel on the emulator, with the C interface of ../cuda/channel.cu: for tests/unit/test_cuda_channel.py.
// A launch ends before its function returns. An error is 1, and adrenaline_error says what the emulator found wrong.
#include "../cuda/emulation/primitives.h"

#include "../cuda/channel.h"

using namespace adrenaline::cuda;

namespace {

std::string complaint;
uint64_t launches = 0;  // draws the order of blocks

template <typename Kernel>
int launch(int blocks, int threads, const Kernel& kernel) {
  // The emulator has whole warps. Where a kernel has one thread, the others do nothing.
  complaint = emulation::Machine().run(blocks, threads < emulation::kLanes ? emulation::kLanes : threads, 0, ++launches, [&] {
    if (device::thread_index() < threads) kernel();
  });
  return complaint.empty() ? 0 : 1;
}

}  // namespace

extern "C" {

size_t adrenaline_channel_bytes() { return sizeof(ChannelMessage); }
size_t adrenaline_channel_state_bytes() { return sizeof(ChannelState); }
const char* adrenaline_error(int) { return complaint.c_str(); }
int adrenaline_channel_prepare() { return 0; }

int adrenaline_channel_begin(const ChannelEnd* end, void*) {
  return launch(1, 1, [&] { Channel::begin(*end); });
}
int adrenaline_channel_send(const ChannelMessage* message, int blocks, void*) {
  return launch(channel_blocks(*message, blocks), kChannelThreads, [&] { Channel::send(*message); });
}
int adrenaline_channel_await(const ChannelEnd* end, int layer, const ChannelWork* work, void*) {
  return launch(1, 1, [&] { Channel::await(*end, layer, *work); });
}
int adrenaline_channel_publish(const ChannelEnd* end, int layer, void*) {
  return launch(1, 1, [&] { Channel::publish(*end, layer); });
}
int adrenaline_channel_take(const ChannelMessage* message, int blocks, void*) {
  return launch(channel_blocks(*message, blocks), kChannelThreads, [&] { Channel::take(*message); });
}
int adrenaline_channel_close(const ChannelEnd* end, void*) {
  return launch(1, 1, [&] { Channel::close(*end); });
}

}  // extern "C"
