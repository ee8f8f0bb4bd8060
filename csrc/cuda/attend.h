// The kernel: append the new tokens of a batch to vLLM's paged KV cache, and attend. A block of four warps walks along its
// stretch of the work (work.h). Of each part it loads the tokens through a ring of stages. Its warps divide what a stage
// has: by queries where there are more than 16, else by tokens.
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
    // Warps that have other queries: 1, 2 or 4, as a shift, for nothing is divided in the loop.
    const int row_shift = queries <= 16 ? 0 : queries <= 32 ? 1 : 2, row_tiles = 1 << row_shift;
    const int row_tile = warp_index() & (row_tiles - 1);
    constexpr int kLoad = Memory::Layout::kLoad;
    const int stages = call.stages, loads = span.part.tiles * (kTile / kLoad), thread = device::thread_index();

    if (thread < kLoad)
      for (int load = 0; load < stages && load < loads; ++load)
        device::shared_store(Memory::place_at(load, thread),
                             place_of(call, span, find(call, span, span.position(load * kLoad + thread))));

    uint32_t packed[Parts::kSteps][4];
    const int window = call.batch.window, last = span.row.context + span.row.queries - 1;
    Logits logits{call.scale * call.k_scale, call.soft_cap, {-1, -1}, window, window > 0 ? last - window + 1 : 0,
                  span.row.context};
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

    device::barrier();  // places are there for all
    for (int load = 0; load < stages - 1; ++load) {
      if (load < loads) Memory::start(call, span, load, load);
      device::copy_commit();
    }
    Running<T, C, kHead> running;
    int stage = 0, free = stages - 1;  // of what is attended, and of what is loaded
    for (int load = 0; load < loads; ++load) {
      device::copy_wait(stages - 2);
      device::barrier();  // this load is there for all, and nobody attends the one before any more
      const int ahead = load + stages;
      if (ahead - 1 < loads) Memory::start(call, span, ahead - 1, free);
      device::copy_commit();
      const bool finds_place = ahead < loads && thread < kLoad;
      const Found found = finds_place ? find(call, span, span.position(ahead * kLoad + thread)) : Found{};
      for (int token = (warp_index() >> row_shift) * 16; token < kLoad; token += (kWarps >> row_shift) * 16) {
        const int position = span.position(load * kLoad + token);
        if (position >= span.row.end) break;
        running.attend(packed, logits, Memory::keys_at(stage), Memory::values_at(stage), token, position);
      }
      // What was asked for before has come by now.
      if (finds_place) device::shared_store(Memory::place_at(ahead, thread), place_of(call, span, found));
      free = stage;
      stage = stage + 1 == stages ? 0 : stage + 1;
    }
    device::copy_wait(0);
    device::barrier();  // the stages are free for outputs
    const Merge<T, C, kHead> merge(call, span, queries, row_tiles);
    merge.leave(running);
    device::barrier();  // outputs are there
    // The next part writes to this memory behind a barrier only; places it writes before, and those are not in use.
    merge.finish();
  }
};

}  // namespace adrenaline::cuda
