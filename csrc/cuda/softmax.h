// A warp's 16 queries over 16 tokens after 16 tokens: running maximum, sum and output, in base 2.
#pragma once

#include <cmath>

#include "fragments.h"

namespace adrenaline::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMinusInfinity = -INFINITY;

// The factor by which what was summed below maximum `from` counts below maximum `to`. Nothing counts nothing.
ADRENALINE_DEVICE float rescale(float from, float to) { return from == kMinusInfinity ? 0.0f : device::exp2(from - to); }

// How logits of a call are made of products, and which tokens a query attends.
struct Logits {
  float scale, cap;  // of the product; 0: no cap
  int last[2];       // the last token that rows g and g + 8 attend; below 0: there is no such row
  int window;

  ADRENALINE_DEVICE float of(float product, int half, int position) const {
    if (position > last[half] || (window > 0 && position <= last[half] - window)) return kMinusInfinity;
    if (cap == 0.0f) return product * (scale * kLog2e);
    const float doubled = device::exp2(product * (scale / cap * (2.0f * kLog2e)));
    return cap * kLog2e * (1.0f - 2.0f / (doubled + 1.0f));  // cap tanh(scale product / cap)
  }
};

template <typename T, typename C, int kHead>
struct Running {
  using Parts = Fragments<T, C, kHead>;

  float output[kHead / 8][4] = {};
  float maximum[2] = {kMinusInfinity, kMinusInfinity};
  float sum[2] = {};  // this lane's share of it

  // Attend 16 tokens, from `token` of a tile on, whose first one is `position` of the sequence.
  ADRENALINE_DEVICE void attend(const uint32_t (&queries)[Parts::kSteps][4], const Logits& logits, uint32_t keys_at,
                                uint32_t values_at, int token, int position) {
    float weight[2][4] = {};
    ADRENALINE_UNROLL
    for (int step = 0; step < Parts::kSteps; ++step) {
      uint32_t keys[2][2];
      Parts::load_keys(keys, keys_at, token, step);
      Math<T>::multiply(weight[0], queries[step], keys[0]);
      Math<T>::multiply(weight[1], queries[step], keys[1]);
    }
    const int first = position + lane_index() % 4 * 2;
    ADRENALINE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float greatest = maximum[half];
      ADRENALINE_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& x = weight[i / 2][2 * half + i % 2];
        x = logits.of(x, half, first + i / 2 * 8 + i % 2);
        greatest = fmaxf(greatest, x);
      }
      greatest = fmaxf(greatest, device::shuffle_xor(greatest, 1));
      greatest = fmaxf(greatest, device::shuffle_xor(greatest, 2));
      const float factor = rescale(maximum[half], greatest);
      maximum[half] = greatest;
      sum[half] *= factor;
      ADRENALINE_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& x = weight[i / 2][2 * half + i % 2];
        x = rescale(x, greatest);
        sum[half] += x;
      }
      ADRENALINE_UNROLL
      for (int eight = 0; eight < kHead / 8; ++eight) {
        output[eight][2 * half] *= factor;
        output[eight][2 * half + 1] *= factor;
      }
    }
    // C of two times eight columns is A of 16 summed ones.
    const uint32_t a[4] = {Math<T>::pack(weight[0][0], weight[0][1]), Math<T>::pack(weight[0][2], weight[0][3]),
                           Math<T>::pack(weight[1][0], weight[1][1]), Math<T>::pack(weight[1][2], weight[1][3])};
    ADRENALINE_UNROLL
    for (int quad = 0; quad < Parts::kQuads; ++quad) {
      uint32_t values[4][2];
      Parts::load_values(values, values_at, token, quad);
      ADRENALINE_UNROLL
      for (int eight = 0; eight < 4; ++eight) Math<T>::multiply(output[quad * 4 + eight], a, values[eight]);
    }
  }
};

}  // namespace adrenaline::cuda
