// From the cache and the message into shared memory, and from the message into the cache.
//
// A new token's k and v are read from the message, not from the cache: the block whose part has the token takes them from
// there, puts them into its tile in the cache's format, and writes the same bytes to the cache. A token and KV head is in
// one unit (of those that differ in the row block only, the first writes), and in one of its parts. So each is appended
// once, nobody reads in a launch what is written in it, and no block waits for another. A token without a slot is in the
// cache already and is read there, as vLLM would.
#pragma once

#include "call.h"
#include "elements.h"

namespace adrenaline::cuda {

// Where a token's keys and values are: an offset into the cache, kNowhere, or below 0: -1 - the token's number.
constexpr int64_t kNowhere = INT64_MIN;

// What a part attends: its place in the line, its row, and the first of its tokens.
struct Span {
  Part part;
  Row row;

  // Of a token, counted from the first of the part.
  ADRENALINE_DEVICE int position(int token) const { return row.begin + part.tile * kTile + token; }
};

// Where a token is, as far as one load says it. What is made of that (`place_of`) is made later: whoever multiplies a
// number just asked for waits for it.
struct Found {
  static constexpr int32_t kNew = -1, kNone = -2;

  int32_t block = kNone;  // of the cache; kNew, or kNone
  int32_t at = 0;         // in the block; of a new token its number
};

ADRENALINE_DEVICE Found find(const Call& call, const Span& span, int position) {
  if (position >= span.row.end) return {};
  if (position >= span.row.context) {
    const int token = span.row.query_begin + position - span.row.context;
    if (device::load(call.slot_mapping + token) >= 0) return {Found::kNew, token};
  }
  const int in_row = static_cast<uint32_t>(position) / static_cast<uint32_t>(call.block_size);
  return {device::load(call.block_table + span.part.row * call.table_stride + in_row),
          position - in_row * call.block_size};
}

ADRENALINE_DEVICE int64_t place_of(const Call& call, const Span& span, const Found& found) {
  if (found.block == Found::kNone) return kNowhere;
  if (found.block == Found::kNew) return -1 - int64_t{found.at};
  return found.block * call.block_stride + found.at * call.token_stride + span.part.kv_head * call.head_stride;
}

template <typename T, typename C, int kHead>
struct Tiles {
  using Layout = SharedLayout<T, C, kHead>;

  static ADRENALINE_DEVICE uint32_t place_at(int load, int token) {
    return Layout::kPlaces + (load % kMostStages * Layout::kLoad + token) * uint32_t{sizeof(int64_t)};
  }
  static ADRENALINE_DEVICE uint32_t keys_at(int stage) { return Layout::kStages + stage * Layout::kStageBytes; }
  static ADRENALINE_DEVICE uint32_t values_at(int stage) { return keys_at(stage) + Layout::kLoadBytes; }

  // Start load number `load` of a part, into `stage`. Its places must be in shared memory.
  static ADRENALINE_DEVICE void start(const Call& call, const Span& span, int load, int stage) {
    const C* keys = static_cast<const C*>(call.keys);
    const C* values = static_cast<const C*>(call.values);
    constexpr int kEach = Layout::kLoad * Layout::kPieces / kThreads;
    if (span.position((load + 1) * Layout::kLoad) <= span.row.context) {  // all of it is in the cache
      int64_t offset[kEach];  // read before the first copy, which would make each wait for the one before
      ADRENALINE_UNROLL
      for (int i = 0; i < kEach; ++i) {
        const InTile at = in_tile(i);
        offset[i] = device::shared_load<int64_t>(place_at(load, at.token)) + at.piece * kNumbers;
      }
      ADRENALINE_UNROLL
      for (int i = 0; i < kEach; ++i) {
        const uint32_t to = keys_at(stage) + in_tile(i).offset;
        device::copy_async(to, keys + offset[i], true);
        device::copy_async(to + Layout::kLoadBytes, values + offset[i], true);
      }
      return;
    }
    ADRENALINE_ROLLED
    for (int i = 0; i < kEach; ++i) {
      const InTile at = in_tile(i);
      const int64_t place = device::shared_load<int64_t>(place_at(load, at.token));
      const bool there = place != kNowhere;
      if (there && place < 0) {
        append(call, span, static_cast<int>(-1 - place), at.piece, keys_at(stage) + at.offset,
               values_at(stage) + at.offset);
        continue;
      }
      const int64_t offset = (there ? place : 0) + at.piece * kNumbers;
      device::copy_async(keys_at(stage) + at.offset, keys + offset, there);
      device::copy_async(values_at(stage) + at.offset, values + offset, there);
    }
  }

 private:
  static constexpr int kNumbers = 16 / int{sizeof(C)};  // in a piece

  // What the calling thread loads as its `i`th: a piece of a token, and where in the stage that belongs.
  struct InTile {
    int token, piece;
    uint32_t offset;
  };
  static ADRENALINE_DEVICE InTile in_tile(int i) {
    const uint32_t thread = device::thread_index();
    uint32_t token, piece;
    if constexpr (kThreads % Layout::kPieces == 0) {  // so that little depends on i
      token = thread / Layout::kPieces + i * (kThreads / Layout::kPieces);
      piece = thread % Layout::kPieces;
    } else {
      token = (i * kThreads + thread) / Layout::kPieces;
      piece = (i * kThreads + thread) % Layout::kPieces;
    }
    return {static_cast<int>(token), static_cast<int>(piece), token * Layout::kRow + piece * 16};
  }

  static ADRENALINE_DEVICE void append(const Call& call, const Span& span, int token, int piece, uint32_t key_at,
                                       uint32_t value_at) {
    const int64_t in_head = int64_t{span.part.kv_head} * kHead + piece * kNumbers;
    const Piece key = in_cache(static_cast<const T*>(call.k) + token * call.k_stride + in_head, call.k_scale);
    const Piece value = in_cache(static_cast<const T*>(call.v) + token * call.v_stride + in_head, call.v_scale);
    device::shared_store(key_at, key);
    device::shared_store(value_at, value);
    if (span.part.row_block != 0) return;
    const int64_t slot = device::load(call.slot_mapping + token);
    const int64_t block = slot / call.block_size;
    const int64_t to = block * call.block_stride + (slot - block * call.block_size) * call.token_stride +
                       span.part.kv_head * call.head_stride + piece * kNumbers;
    device::store(reinterpret_cast<Piece*>(static_cast<C*>(call.keys) + to), key);
    device::store(reinterpret_cast<Piece*>(static_cast<C*>(call.values) + to), value);
  }

  // 16 bytes of the cache, from numbers of the message.
  static ADRENALINE_DEVICE Piece in_cache(const T* from, float scale) {
    if constexpr (sizeof(C) == sizeof(T)) {
      return device::load(reinterpret_cast<const Piece*>(from));
    } else {
      Piece made;
      ADRENALINE_UNROLL
      for (int w = 0; w < 4; ++w) {
        made.word[w] = 0;
        ADRENALINE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float x = Math<T>::widen(device::load(from + 4 * w + i).bits);
          made.word[w] |= to_fp8(x / scale) << 8 * i;
        }
      }
      return made;
    }
  }
};

}  // namespace adrenaline::cuda
