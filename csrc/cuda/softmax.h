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
  int all_from, all_to;  // every row attends every token from the first to the last of these

  // Make logits of products.
  ADRENALINE_DEVICE void of(float (&products)[2][4]) const {
    if (cap == 0.0f) {
      ADRENALINE_UNROLL
      for (int i = 0; i < 8; ++i) products[i / 4][i % 4] *= scale * kLog2e;
    } else {
      ADRENALINE_UNROLL
      for (int i = 0; i < 8; ++i) {
        float& x = products[i / 4][i % 4];
        const float doubled = device::exp2(x * (scale / cap * (2.0f * kLog2e)));
        x = cap * kLog2e * (1.0f - 2.0f / (doubled + 1.0f));  // cap tanh(scale product / cap)
      }
    }
  }
  ADRENALINE_DEVICE bool attends(int half, int position) const {
    return position <= last[half] && (window == 0 || position > last[half] - window);
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
    float weight[2][4] = {}, odd[2][4] = {};  // of even steps and of odd ones, so that two products are under way
    ADRENALINE_UNROLL
    for (int step = 0; step < Parts::kSteps; ++step) {
      uint32_t keys[2][2];
      Parts::load_keys(keys, keys_at, token, step);
      Math<T>::multiply((step % 2 ? odd : weight)[0], queries[step], keys[0]);
      Math<T>::multiply((step % 2 ? odd : weight)[1], queries[step], keys[1]);
    }
    ADRENALINE_UNROLL
    for (int i = 0; i < 8; ++i) weight[i / 4][i % 4] += odd[i / 4][i % 4];
    logits.of(weight);
    if (position < logits.all_from || position + 15 > logits.all_to) {
      ADRENALINE_UNROLL
      for (int i = 0; i < 8; ++i)
        if (!logits.attends(i % 4 / 2, position + lane_index() % 4 * 2 + i / 4 * 8 + i % 2))
          weight[i / 4][i % 4] = kMinusInfinity;
    }
    float greatest[2];
    ADRENALINE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float x = maximum[half];
      ADRENALINE_UNROLL
      for (int i = 0; i < 4; ++i) x = fmaxf(x, weight[i / 2][2 * half + i % 2]);
      x = fmaxf(x, device::shuffle_xor(x, 1));
      greatest[half] = fmaxf(x, device::shuffle_xor(x, 2));
    }
    // Most tokens raise no row's maximum.
    if (device::any(greatest[0] != maximum[0] || greatest[1] != maximum[1])) raise(greatest);
    ADRENALINE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float base = maximum[half] == kMinusInfinity ? 0.0f : maximum[half];
      ADRENALINE_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& x = weight[i / 2][2 * half + i % 2];
        x = device::exp2(x - base);
        sum[half] += x;
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

 private:
  // Count from now on below these maxima.
  ADRENALINE_DEVICE void raise(const float (&greatest)[2]) {
    ADRENALINE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float factor = rescale(maximum[half], greatest[half]);
      maximum[half] = greatest[half];
      sum[half] *= factor;
      ADRENALINE_UNROLL
      for (int eight = 0; eight < kHead / 8; ++eight) {
        output[eight][2 * half] *= factor;
        output[eight][2 * half + 1] *= factor;
      }
    }
  }
};

}  // namespace adrenaline::cuda
