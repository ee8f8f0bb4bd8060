// The kernel: append the new tokens of a batch to vLLM's paged KV cache, and attend. A block of four warps walks along its
// stretch of the work (work.h). Of each part it loads tiles of 64 tokens through a ring of stages. Its warps divide a tile:
// by queries where there are more than 16, else by tokens.
#pragma once

#include "merge.h"

namespace adrenaline::cuda {

template <typename T, typename C, int kHead>
class Attention {
 public:
  using Memory = Tiles<T, C, kHead>;
  using Parts = Fragments<T, C, kHead>;

  static ADRENALINE_DEVICE void run(const Call& call) {
    Stretch stretch(call.batch, call.first_tile, device::block_index(), device::block_count());
    Span span;
    while (stretch.next(span.part)) {
      span.row = row_of(call.batch, span.part.row);
      attend(call, span);
    }
  }

 private:
  static ADRENALINE_DEVICE void attend(const Call& call, const Span& span) {
    const int group = call.batch.group, first = span.part.row_block * kRowBlock;
    const int rest = span.row.queries * group - first, queries = rest < kRowBlock ? rest : kRowBlock;
    const int row_tiles = queries <= 16 ? 1 : queries <= 32 ? 2 : 4;
    const int row_tile = warp_index() % row_tiles;
    const int stages = call.stages, tiles = span.part.tiles, thread = device::thread_index();

    if (thread < kTile)
      for (int tile = 0; tile < stages && tile < tiles; ++tile)
        device::shared_store(Memory::place_at(tile, thread), place_of(call, span, span.position(tile, thread)));

    uint32_t packed[Parts::kSteps][4];
    Logits logits{call.scale * call.k_scale, call.soft_cap, {-1, -1}, call.batch.window};
    const T* rows[2] = {nullptr, nullptr};
    ADRENALINE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int query = row_tile * 16 + lane_index() / 4 + 8 * half;
      if (query >= queries) continue;
      const int token = (first + query) / group, head = span.part.kv_head * group + (first + query) % group;
      logits.last[half] = span.row.context + token;
      rows[half] = static_cast<const T*>(call.q) + (span.row.query_begin + token) * call.q_stride + head * kHead;
    }
    Parts::load_queries(packed, rows[0], rows[1]);

    device::barrier();
    for (int tile = 0; tile < stages - 1; ++tile) {
      if (tile < tiles) Memory::load(call, span, tile, tile);
      device::copy_commit();
    }
    Running<T, C, kHead> running;
    int stage = 0, free = stages - 1;  // of the tile that is attended, and of the one that is loaded
    for (int tile = 0; tile < tiles; ++tile) {
      device::copy_wait(stages - 2);
      device::barrier();  // the tile is there for all, and nobody attends the one before any more
      const int ahead = tile + stages;
      const bool finds_place = ahead < tiles && thread < kTile;
      const int64_t place = finds_place ? place_of(call, span, span.position(ahead, thread)) : kNowhere;
      if (ahead - 1 < tiles) Memory::load(call, span, ahead - 1, free);
      device::copy_commit();
      for (int token = warp_index() / row_tiles * 16; token < kTile; token += kWarps / row_tiles * 16) {
        const int position = span.position(tile, token);
        if (position >= span.row.end) break;
        running.attend(packed, logits, Memory::keys_at(stage), Memory::values_at(stage), token, position);
      }
      // What was asked for a tile ago has come by now.
      if (finds_place) device::shared_store(Memory::place_at(ahead, thread), place);
      free = stage;
      stage = stage + 1 == stages ? 0 : stage + 1;
    }
    device::copy_wait(0);
    device::barrier();  // the stages are free for outputs
    const Merge<T, C, kHead> merge(call, span, queries, row_tiles);
    merge.leave(running);
    device::barrier();
    merge.finish();
    device::barrier();  // shared memory is free for the next part
  }
};

}  // namespace adrenaline::cuda
