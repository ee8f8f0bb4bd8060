// The kernels of csrc/cuda on the emulator, and their division of work, as a library for tests/unit/test_cuda_*.py.
#include <cstring>

#include "../cuda/emulation/launch.h"

using namespace adrenaline::cuda;

namespace {

// Say what went wrong; return whether anything did.
int tell(const std::string& what, char* said, size_t room) {
  std::strncpy(said, what.c_str(), room - 1);
  said[room - 1] = '\0';
  return what.empty() ? 0 : 1;
}

}  // namespace

extern "C" {

size_t adrenaline_call_bytes() { return sizeof(Call); }
// 0 for a kernel that is not compiled.
int adrenaline_shared_bytes(const Kind* kind, int stages) {
  int bytes = 0;
  for_kind(*kind, [&](auto instance) { bytes = decltype(instance)::Layout::bytes(stages); });
  return bytes;
}

int64_t adrenaline_partial_floats(int blocks, int head_size) { return partial_floats(blocks, head_size); }

int adrenaline_emulate_plan(const Call* call, int32_t* first_tile, uint64_t seed, char* said, size_t room) {
  return tell(emulation::plan(call->batch, first_tile, seed), said, room);
}

int adrenaline_emulate_attend(const Call* call, const Kind* kind, int blocks, uint64_t seed, char* said, size_t room) {
  return tell(emulation::attend(*call, *kind, blocks, seed), said, room);
}

void adrenaline_plan_on_host(const Call* call, int32_t* first_tile) { plan_on_host(call->batch, first_tile); }

// Put a block's parts into `parts` [most, 7]. Return how many there are.
int adrenaline_parts(const Call* call, const int32_t* first_tile, int block, int blocks, int32_t* parts, int most) {
  Stretch stretch(call->batch, first_tile, block, blocks);
  int count = 0;
  for (Part part; stretch.next(part); ++count)
    if (count < most) std::memcpy(parts + 7 * count, &part, sizeof part);
  return count;
}

}  // extern "C"
