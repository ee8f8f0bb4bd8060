// Launches of the kernels on the emulator.
#pragma once

#include "../instances.h"
#include "../plan.h"

namespace adrenaline::cuda::emulation {

// Each returns what went wrong; empty if nothing did. `seed` draws the order of blocks.
inline std::string plan(const Batch& batch, int32_t* first_tile, uint64_t seed) {
  return Machine().run(1, kPlanThreads, kPlanShared, seed, [&] { make_plan(batch, first_tile); });
}

inline std::string attend(const Call& call, const Kind& kind, int blocks, uint64_t seed) {
  std::string said = "this kernel is not compiled";
  for_kind(kind, [&](auto instance) {
    using I = decltype(instance);
    said = Machine().run(blocks, kThreads, I::Layout::bytes(call.stages), seed, [&] {
      Attention<typename I::Element, typename I::Cache, I::kHeadSize>::run(call);
    });
  });
  return said;
}

}  // namespace adrenaline::cuda::emulation
