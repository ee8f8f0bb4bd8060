// What one launch attends: plain data, the same for the host, the device and Python (vllm_adrenaline/native/cuda.py).
#pragma once

#include <cstdint>

#include "work.h"

namespace adrenaline::cuda {

// Strides count elements; T tokens, Hq query heads, Hk KV heads, D elements of a head.
struct Call {
  Batch batch;

  // The message as it arrived: q [T, Hq, D], k and v [T, Hk, D]. k, v and both caches begin at multiples of 16 bytes, and
  // so do their rows.
  const void *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;  // from a token to the next

  // Where the output of token t goes: to row out_rows[t] of `out`; to row t if out_rows is null.
  void* out;
  const int64_t* out_rows;
  int64_t out_stride;

  // vLLM's paged cache. NHD or HND is a matter of strides.
  void *keys, *values;
  int64_t block_stride, token_stride, head_stride;
  const int32_t* block_table;  // [R, W]
  int64_t table_stride;
  const int64_t* slot_mapping;  // [T]; -1: the token's k and v are in the cache already

  const float* sinks;  // [Hq]: logits that take part in each sum; null: none
  float scale, soft_cap;  // soft_cap 0: none
  float k_scale, v_scale;  // what a number of the cache is multiplied by; 1 unless the cache is fp8

  // Working memory. first_tile: by `plan`, once a step. partials: partial_floats. counters: one for each block of the
  // grid, 0 before the first launch; every launch leaves them so.
  const int32_t* first_tile;  // [R + 1]
  float* partials;
  uint32_t* counters;

  int32_t block_size, stages;
};

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kLeastStages = 2, kMostStages = 4;
constexpr int kMostBlocks = 3;  // of a multiprocessor, that are aimed at

// Floats of working memory that a grid of `blocks` needs. A block leaves at most two parts of rows to others: of what it
// begins in the middle of, and of what it ends in the middle of. A row has its outputs, its sum and its maximum.
constexpr int64_t partial_floats(int blocks, int head_size) {
  return int64_t{2} * blocks * kRowBlock * (head_size + 2);
}

// Shared memory of a kernel, in bytes from its begin: where the tokens of each stage are, the sums of each warp, a flag,
// and the stages. When all tiles were attended, the stages' room is used for the outputs of each warp.
template <typename T, typename C, int kHead>
struct SharedLayout {
  static constexpr int kPieces = kHead * int{sizeof(C)} / 16;  // pieces of 16 bytes in a head of a token
  static constexpr int kRow = kHead * int{sizeof(C)} + 16;     // an odd number of pieces, so that banks do not collide
  // Tokens in a stage, a tile or half of it: two stages must fit the 99 KiB that the smallest devices have.
  static constexpr int kLoad = kRow > 272 ? kTile / 2 : kTile;
  static constexpr int kLoadBytes = kLoad * kRow, kStageBytes = 2 * kLoadBytes;
  static constexpr int kOutputRow = 4 * (kHead + 8);
  static constexpr int kPlaces = 0;
  static constexpr int kSums = kPlaces + kMostStages * kLoad * int{sizeof(int64_t)};
  static constexpr int kFlag = kSums + kWarps * 16 * 2 * int{sizeof(float)};
  static constexpr int kStages = kFlag + 16;
  static_assert(kRow / 16 % 2 == 1 && kStages % 16 == 0 && kLoad * kPieces % kThreads == 0);

  static constexpr int bytes(int stages) {
    const int outputs = kWarps * 16 * kOutputRow;
    return kStages + (stages * kStageBytes > outputs ? stages * kStageBytes : outputs);
  }
  static_assert(kStages + 2 * kStageBytes <= 99 << 10 && kStages + kWarps * 16 * kOutputRow <= 99 << 10);
};

}  // namespace adrenaline::cuda
