// One step's batch, split by the pool of its KV: what vLLM's stock kernel may see, and a plan for every executor.
//
// A block id carries the pool of its block in the high bits (vllm_adrenaline/kv/space.py): 0 is the decode engine's own
// memory. The split is made once a step, in one pass. Nothing of it changes between layers.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include "../check.h"

namespace adrenaline::plan {

constexpr int kIndexBits = 24;
constexpr int32_t kIndexMask = (1 << kIndexBits) - 1;
constexpr unsigned kMaxExecutors = 64;

// A batch of R requests and T tokens. block_table: [R, width], rows `table_stride` ids apart. query_start_loc: [R + 1].
// seq_lens: [R], tokens. slot_mapping: [num_slots], T or more. block_size: tokens of a block.
struct Batch {
  uint32_t rows, width;
  const int32_t* block_table;
  int64_t table_stride;
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  int64_t* slot_mapping;
  uint32_t num_slots, block_size;
};

// The rows of one executor: R requests, T tokens. Block and slot numbers are the executor's own; a slot is -1 where the
// KV cache must not be written. rows: the rows' numbers in the batch; tokens: their tokens' positions in it.
struct RowsPlan {
  std::vector<int32_t> rows, query_start_loc{0}, seq_lens, block_table;
  std::vector<int64_t> slot_mapping, tokens;
};

// The plans by executor, and whether any row is local.
struct Split {
  std::map<unsigned, RowsPlan> remote;
  bool has_local = false;
};

// Split `batch`. `received`: per request, whether the k and v of its one token are in the cache already. What the stock
// kernel must not touch is masked: remote rows get block 0 and a sequence as long as their query in `local_table`
// [R, width] and `local_lens` [R]; remote and received tokens lose their slot, in place.
inline Split split(const Batch& batch, const std::vector<bool>& received, int32_t* local_table, int32_t* local_lens) {
  ADRENALINE_CHECK(batch.rows > 0 && batch.width > 0 && batch.block_size > 0, "an empty batch");
  Split result;
  for (uint32_t row = 0; row < batch.rows; ++row) {
    const int32_t* table = batch.block_table + row * batch.table_stride;
    const int32_t begin = batch.query_start_loc[row], end = batch.query_start_loc[row + 1];
    const int32_t length = batch.seq_lens[row], query = end - begin;
    ADRENALINE_CHECK(begin >= 0 && query > 0 && static_cast<uint32_t>(end) <= batch.num_slots, "a row has no tokens");
    ADRENALINE_CHECK(length >= query && static_cast<uint64_t>(length) <= uint64_t{batch.width} * batch.block_size,
                     "a sequence is longer than its block table");
    int32_t* local = local_table + static_cast<size_t>(row) * batch.width;
    const int32_t pool = table[0] >> kIndexBits;
    if (pool == 0) {
      result.has_local = true;
      std::memcpy(local, table, batch.width * sizeof(int32_t));
      local_lens[row] = length;
      if (received[row]) batch.slot_mapping[begin] = -1;
      continue;
    }
    ADRENALINE_CHECK(pool > 0 && pool <= static_cast<int32_t>(kMaxExecutors), "a block of no known pool");
    std::memset(local, 0, batch.width * sizeof(int32_t));
    local_lens[row] = query;
    RowsPlan& plan = result.remote[static_cast<unsigned>(pool - 1)];
    plan.rows.push_back(static_cast<int32_t>(row));
    plan.seq_lens.push_back(length);
    for (uint32_t i = 0; i < batch.width; ++i) plan.block_table.push_back(table[i] & kIndexMask);
    for (int32_t token = begin; token < end; ++token) {
      const int32_t position = length - (end - token);
      const int64_t block = table[position / batch.block_size] & kIndexMask;
      plan.slot_mapping.push_back(received[row] ? -1 : block * batch.block_size + position % batch.block_size);
      plan.tokens.push_back(token);
      batch.slot_mapping[token] = -1;
    }
    plan.query_start_loc.push_back(static_cast<int32_t>(plan.tokens.size()));
  }
  return result;
}

}  // namespace adrenaline::plan
