// The operands of tensor cores, as m16n8k16 wants them spread over the 32 lanes of a warp (PTX manual): with g = lane / 4
// and t = lane % 4, a lane has of A rows g and g + 8, of B column g, of C rows g and g + 8 and columns 2t, 2t + 1; of the
// summed dimension it has 2t, 2t + 1, 2t + 8 and 2t + 9.
//
// A sum may be made in any order, and a product's columns in any order, so lanes of an fp8 cache have other dimensions
// of a head: four neighbours each, which one load of a word brings. `query_dim` and `output_dim` say which.
#pragma once

#include "call.h"
#include "elements.h"

namespace adrenaline::cuda {

ADRENALINE_DEVICE int lane_index() { return device::thread_index() % 32; }
ADRENALINE_DEVICE int warp_index() { return device::thread_index() / 32; }

template <typename T, typename C, int kHead>
struct Fragments {
  static constexpr bool kIsFp8 = sizeof(C) == 1;
  static constexpr int kSteps = kHead / 16;  // of the summed dimension of q k
  static constexpr int kQuads = kHead / 32;  // four times eight columns of the output
  static constexpr int kRow = SharedLayout<T, C, kHead>::kRow;

  // The first of the two neighbouring dimensions of a head that a lane has in words `half` (0, 1) of step `step`.
  static ADRENALINE_DEVICE int query_dim(int step, int half) {
    const int t = lane_index() % 4;
    return step * 16 + (kIsFp8 ? 4 * t + 2 * half : 2 * t + 8 * half);
  }

  // The dimension of a head that is column `column` (0 to 7) of the output's eight columns number `eight`.
  static ADRENALINE_DEVICE int output_dim(int eight, int column) {
    return kIsFp8 ? eight / 4 * 32 + column * 4 + eight % 4 : eight * 8 + column;
  }

  // A of q k: rows g and g + 8 of the queries; a null row is zero.
  static ADRENALINE_DEVICE void load_queries(uint32_t (&to)[kSteps][4], const T* row, const T* row_8) {
    ADRENALINE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      ADRENALINE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int dim = query_dim(step, half);
        to[step][2 * half] = row == nullptr ? 0 : device::load(reinterpret_cast<const uint32_t*>(row + dim));
        to[step][2 * half + 1] = row_8 == nullptr ? 0 : device::load(reinterpret_cast<const uint32_t*>(row_8 + dim));
      }
    }
  }

  // B of q k for 16 tokens from `token` on: two times eight columns.
  static ADRENALINE_DEVICE void load_keys(uint32_t (&to)[2][2], uint32_t tile_at, int token, int step) {
    const int lane = lane_index();
    if constexpr (kIsFp8) {
      ADRENALINE_UNROLL
      for (int eight = 0; eight < 2; ++eight) {
        const uint32_t at = tile_at + (token + eight * 8 + lane / 4) * kRow + step * 16 + lane % 4 * 4;
        const uint32_t four = device::shared_load<uint32_t>(at);
        to[eight][0] = Math<T>::from_fp8((four & 0xff) | (four & 0xff00) << 8);
        to[eight][1] = Math<T>::from_fp8((four >> 16 & 0xff) | (four >> 8 & 0xff0000));
      }
    } else {
      // Matrices in the order: tokens 0-7 with dimensions 0-7 and 8-15, tokens 8-15 with the same.
      uint32_t four[4];
      device::load_matrices(four, tile_at + (token + lane / 16 * 8 + lane % 8) * kRow + step * 32 + lane / 8 % 2 * 16);
      to[0][0] = four[0], to[0][1] = four[1], to[1][0] = four[2], to[1][1] = four[3];
    }
  }

  // B of weights v for 16 tokens from `token` on: four times eight columns.
  static ADRENALINE_DEVICE void load_values(uint32_t (&to)[4][2], uint32_t tile_at, int token, int quad) {
    const int lane = lane_index();
    if constexpr (kIsFp8) {
      uint32_t word[2][2];
      ADRENALINE_UNROLL
      for (int half = 0; half < 2; ++half) {
        ADRENALINE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int row = token + half * 8 + lane % 4 * 2 + i;
          word[half][i] = device::shared_load<uint32_t>(tile_at + row * kRow + quad * 32 + lane / 4 * 4);
        }
      }
      ADRENALINE_UNROLL
      for (int eight = 0; eight < 4; ++eight) {
        ADRENALINE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t low = word[half][0] >> 8 * eight & 0xff, high = word[half][1] >> 8 * eight & 0xff;
          to[eight][half] = Math<T>::from_fp8(low | high << 16);
        }
      }
    } else {
      ADRENALINE_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        // Matrices in the order: dimensions 0-7 with tokens 0-7 and 8-15, dimensions 8-15 with the same.
        uint32_t four[4];
        const int row = token + lane / 8 % 2 * 8 + lane % 8;
        device::load_matrices_transposed(four, tile_at + row * kRow + quad * 64 + pair * 32 + lane / 16 * 16);
        to[2 * pair][0] = four[0], to[2 * pair][1] = four[1];
        to[2 * pair + 1][0] = four[2], to[2 * pair + 1][1] = four[3];
      }
    }
  }
};

}  // namespace adrenaline::cuda
