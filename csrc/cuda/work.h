// How the work of a launch is divided: plain C++, the same on host and device.
//
// A row's queries are packed: `group` query heads of each of its tokens, up to kRowBlock of them, share a pass over the
// keys and values of one KV head. One such pass is a unit, and a unit has as many tiles as its tokens need. All units'
// tiles are in one line: by row, then by row block and KV head. Each block of the grid takes an equal stretch of it. So a
// long sequence is shared by as many blocks as its length asks for, and a block attends several short ones.
#pragma once

#include <cstdint>

#include "primitives.h"

namespace adrenaline::cuda {

constexpr int kTile = 64;      // tokens
constexpr int kRowBlock = 64;  // queries, each of one token and one query head
// Tiles below which cutting costs more than it gains: a part must be written, read again and merged.
constexpr int kLeastTiles = 2;

// R rows; `group` query heads to a KV head. Row r has the tokens query_start_loc[r] to query_start_loc[r + 1], which are
// the last ones of its seq_lens[r]. A token attends itself and `window` - 1 tokens before; 0: all.
struct Batch {
  const int32_t *query_start_loc, *seq_lens;
  int32_t rows, group, kv_heads, window;
};

// A row: where its queries begin among the tokens, how many they are, where in the sequence the first of them is, and
// the tokens of the sequence that any of them attends. A row with no token, or fewer in all than queries, has no work.
struct Row {
  int query_begin, queries, context, begin, end;

  ADRENALINE_BOTH int tiles() const { return (end - begin + kTile - 1) / kTile; }
  ADRENALINE_BOTH int row_blocks(int group) const { return (queries * group + kRowBlock - 1) / kRowBlock; }
};

ADRENALINE_BOTH Row row_of(const Batch& batch, int number) {
  Row row{};
  row.query_begin = batch.query_start_loc[number];
  row.queries = batch.query_start_loc[number + 1] - row.query_begin;
  row.end = batch.seq_lens[number];
  row.context = row.end - row.queries;
  if (row.queries <= 0 || row.context < 0) return {row.query_begin, 0, 0, 0, 0};
  if (batch.window > 0 && row.context >= batch.window) row.begin = row.context - batch.window + 1;
  return row;
}

ADRENALINE_BOTH int32_t tiles_of(const Batch& batch, int number) {
  const Row row = row_of(batch, number);
  return row.tiles() * row.row_blocks(batch.group) * batch.kv_heads;
}

// Where each row's tiles begin in the line, and the number of them all: first_tile [R + 1].
inline void plan_on_host(const Batch& batch, int32_t* first_tile) {
  first_tile[0] = 0;
  for (int r = 0; r < batch.rows; ++r) first_tile[r + 1] = first_tile[r] + tiles_of(batch, r);
}

// Tiles that a block of the grid takes; the last ones may get fewer, or none.
ADRENALINE_BOTH int stretch_of(int tiles, int blocks) {
  const int even = static_cast<int>((int64_t{tiles} + blocks - 1) / blocks);
  return even < kLeastTiles ? kLeastTiles : even;
}

// A part of a unit that one block attends: `tiles` of them, from `tile` of the unit on. `parts` blocks share the unit,
// and the first of them is `first_block`.
struct Part {
  int row, row_block, kv_head, tile, tiles, parts, first_block;
};

// The row in whose tiles `at` lies. Rows without tiles are passed over.
ADRENALINE_BOTH int row_at(const int32_t* first_tile, int rows, int at) {
  int low = 0, high = rows;  // first_tile[low] <= at < first_tile[high]
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (first_tile[middle] <= at ? low : high) = middle;
  }
  return low;
}

// The part that begins at tile `at` of the line, which lies in `row`, for a block whose stretch ends at `end`.
ADRENALINE_BOTH Part part_at(const Batch& batch, const int32_t* first_tile, int row, int at, int end, int stretch) {
  Part part{};
  part.row = row;
  const int tiles = row_of(batch, row).tiles(), unit = (at - first_tile[row]) / tiles;
  const int begin = first_tile[row] + unit * tiles;
  part.kv_head = unit % batch.kv_heads;
  part.row_block = unit / batch.kv_heads;
  part.tile = at - begin;
  part.tiles = (begin + tiles < end ? begin + tiles : end) - at;
  part.first_block = begin / stretch;
  part.parts = (begin + tiles - 1) / stretch - part.first_block + 1;
  return part;
}

// A block's stretch of the line, part by part.
class Stretch {
 public:
  ADRENALINE_BOTH Stretch(const Batch& batch, const int32_t* first_tile, int block, int blocks)
      : batch_(batch), first_tile_(first_tile) {
    const int total = first_tile[batch.rows];
    size_ = stretch_of(total, blocks);
    const int64_t begin = int64_t{block} * size_;
    if (begin >= total) return;
    at_ = static_cast<int>(begin);
    end_ = total - at_ < size_ ? total : at_ + size_;
    row_ = row_at(first_tile, batch.rows, at_);
  }

  // Put the next part into `part`. Return whether there was one.
  ADRENALINE_BOTH bool next(Part& part) {
    if (at_ >= end_) return false;
    while (first_tile_[row_ + 1] <= at_) ++row_;
    part = part_at(batch_, first_tile_, row_, at_, end_, size_);
    at_ += part.tiles;
    return true;
  }

 private:
  const Batch& batch_;
  const int32_t* first_tile_;
  int size_ = 0, at_ = 0, end_ = 0, row_ = 0;
};

// Blocks of a grid that fills a share (0 to 1) of a device's multiprocessors, `each` to one of them.
inline int blocks_of(int multiprocessors, double share, int each) {
  const int used = static_cast<int>(multiprocessors * share + 0.5);
  return (used < 1 ? 1 : used) * each;
}

}  // namespace adrenaline::cuda
