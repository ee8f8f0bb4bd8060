// Announcements of a channel, whatever it goes through: a step of one life of the channel, and a layer in it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ADRENALINE_ANYWHERE __host__ __device__
#else
#define ADRENALINE_ANYWHERE
#endif

namespace adrenaline {

constexpr uint64_t kMaxLayers = (1 << 12) - 2;
constexpr uint64_t kMaxEpoch = (1 << 16) - 1;
constexpr uint64_t kMaxStep = (uint64_t{1} << 36) - 1;

// A step of one life of a channel, and a layer in it (0: the plan). It never repeats. So nothing of another step or
// another life can be taken for what is waited for. Within a life it grows.
ADRENALINE_ANYWHERE inline uint64_t stamp(uint64_t epoch, uint64_t step, uint64_t layer_plus_1) {
  return epoch << 48 | (step & kMaxStep) << 12 | layer_plus_1;
}

ADRENALINE_ANYWHERE inline uint64_t step_of(uint64_t stamp) { return stamp >> 12 & kMaxStep; }
ADRENALINE_ANYWHERE inline uint64_t epoch_of(uint64_t stamp) { return stamp >> 48; }

// The last announcement of a life: nothing comes any more. No layer has this number.
ADRENALINE_ANYWHERE inline uint64_t closing_stamp(uint64_t epoch) { return stamp(epoch, 0, kMaxLayers + 1); }

}  // namespace adrenaline
