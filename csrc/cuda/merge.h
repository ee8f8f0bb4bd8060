// The outputs of a part's warps become one, and those of a unit's parts: in the block that comes last, in the order of
// the parts. So the result does not depend on who comes last, and no second kernel runs.
#pragma once

#include "softmax.h"
#include "tiles.h"

namespace adrenaline::cuda {

struct alignas(8) Two {
  float first, second;
};

// Add `x`, `sum` below `maximum`, to what was added before.
struct Merged {
  float maximum = kMinusInfinity, sum = 0.0f;
  Two output{0.0f, 0.0f};

  ADRENALINE_DEVICE void add(Two sums, Two x) {
    const float greatest = fmaxf(maximum, sums.first);
    const float ours = rescale(maximum, greatest), theirs = rescale(sums.first, greatest);
    sum = sum * ours + sums.second * theirs;
    output.first = output.first * ours + x.first * theirs;
    output.second = output.second * ours + x.second * theirs;
    maximum = greatest;
  }
};

template <typename T, typename C, int kHead>
class Merge {
 public:
  using Layout = SharedLayout<T, C, kHead>;
  static constexpr int kPairs = kHead / 2;

  ADRENALINE_DEVICE Merge(const Call& call, const Span& span, int queries, int row_tiles)
      : call_(call), span_(span), queries_(queries), row_tiles_(row_tiles) {}

  // Put the outputs of the calling warp into shared memory. The stages must not be in use any more.
  ADRENALINE_DEVICE void leave(const Running<T, C, kHead>& running) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    ADRENALINE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_index() * 16 + g + 8 * half;
      float sum = running.sum[half];
      sum += device::shuffle_xor(sum, 1);
      sum += device::shuffle_xor(sum, 2);
      if (t == 0) device::shared_store(Layout::kSums + row * uint32_t{sizeof(Two)}, Two{running.maximum[half], sum});
      ADRENALINE_UNROLL
      for (int i = 0; i < kHead / 4; ++i) {
        const int dim = Fragments<T, C, kHead>::output_dim(i / 2, 2 * t + i % 2);
        device::shared_store(Layout::kStages + row * uint32_t{Layout::kOutputRow} + dim * 4,
                             running.output[i / 2][2 * half + i % 2]);
      }
    }
  }

  // Merge what the warps left, behind a barrier, and put it where it belongs.
  ADRENALINE_DEVICE void finish() const {
    const Part& part = span_.part;
    for (int i = device::thread_index(); i < queries_ * kPairs; i += kThreads) {
      const int query = i / kPairs, pair = i % kPairs;
      Merged merged;
      for (int warp = query / 16; warp < kWarps; warp += row_tiles_) {
        const int row = warp * 16 + query % 16;
        merged.add(device::shared_load<Two>(Layout::kSums + row * uint32_t{sizeof(Two)}),
                   device::shared_load<Two>(Layout::kStages + row * uint32_t{Layout::kOutputRow} + pair * 8));
      }
      if (part.parts == 1) {
        put(query, pair, merged);
      } else {
        const int block = device::block_index();
        device::store_for_blocks(partial(block, query, pair), merged.output);
        if (pair == 0) device::store_for_blocks(sums(block, query), Two{merged.maximum, merged.sum});
      }
    }
    if (part.parts > 1 && is_last()) merge_parts();
  }

 private:
  static constexpr int kAtOnce = 8;

  // What a block keeps for a unit that others share: in its first place if the unit began before the block's stretch.
  ADRENALINE_DEVICE int64_t kept_by(int block) const {
    return (int64_t{block} * 2 + (block == span_.part.first_block ? 1 : 0)) * kRowBlock * (kHead + 2);
  }
  ADRENALINE_DEVICE Two* partial(int block, int query, int pair) const {
    return reinterpret_cast<Two*>(call_.partials + kept_by(block)) + query * kPairs + pair;
  }
  ADRENALINE_DEVICE Two* sums(int block, int query) const {
    return reinterpret_cast<Two*>(call_.partials + kept_by(block) + kRowBlock * kHead) + query;
  }

  // Tell the other blocks that this part is there. Return whether all of the unit are: in one block only. A block begins
  // at most one unit that others share, so a unit's counter is that of the block which begins it.
  ADRENALINE_DEVICE bool is_last() const {
    device::barrier();  // the whole part is stored
    if (device::thread_index() == 0) {
      uint32_t* counter = call_.counters + span_.part.first_block;
      device::fence();  // releases what the block stored before the barrier
      const bool last = device::atomic_increment(counter) + 1 == static_cast<uint32_t>(span_.part.parts);
      device::fence();  // acquires what the others released before they counted
      if (last) *counter = 0;
      device::shared_store(Layout::kFlag, static_cast<uint32_t>(last));
    }
    device::barrier();
    return device::shared_load<uint32_t>(Layout::kFlag) != 0;
  }

  ADRENALINE_DEVICE void merge_parts() const {
    for (int i = device::thread_index(); i < queries_ * kPairs; i += kThreads) {
      const int query = i / kPairs, pair = i % kPairs;
      Merged merged;
      // Some are asked for before the first is used, for a long unit has many.
      for (int first = 0; first < span_.part.parts; first += kAtOnce) {
        Two sums_of[kAtOnce], outputs[kAtOnce];
        ADRENALINE_UNROLL
        for (int n = 0; n < kAtOnce; ++n) {
          const int last = span_.part.parts - 1, block = span_.part.first_block + (first + n < last ? first + n : last);
          sums_of[n] = device::load_from_blocks(sums(block, query));
          outputs[n] = device::load_from_blocks(partial(block, query, pair));
        }
        ADRENALINE_UNROLL
        for (int n = 0; n < kAtOnce; ++n)
          if (first + n < span_.part.parts) merged.add(sums_of[n], outputs[n]);
      }
      put(query, pair, merged);
    }
  }

  // Write two numbers of the output.
  ADRENALINE_DEVICE void put(int query, int pair, const Merged& merged) const {
    const int packed = span_.part.row_block * kRowBlock + query;
    const int token = span_.row.query_begin + packed / call_.batch.group;
    const int head = span_.part.kv_head * call_.batch.group + packed % call_.batch.group;
    float maximum = merged.maximum, sum = merged.sum;
    if (call_.sinks != nullptr) {
      const float sink = device::load(call_.sinks + head) * kLog2e;
      maximum = fmaxf(maximum, sink);
      sum = sum * rescale(merged.maximum, maximum) + rescale(sink, maximum);
    }
    const float factor = sum == 0.0f ? 0.0f : rescale(merged.maximum, maximum) * call_.v_scale / sum;
    const int64_t row = call_.out_rows == nullptr ? token : device::load(call_.out_rows + token);
    T* to = static_cast<T*>(call_.out) + row * call_.out_stride + head * kHead + 2 * pair;
    device::store(reinterpret_cast<uint32_t*>(to),
                  Math<T>::pack(merged.output.first * factor, merged.output.second * factor));
  }

  const Call& call_;
  const Span& span_;
  int queries_, row_tiles_;
};

}  // namespace adrenaline::cuda
