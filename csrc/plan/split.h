// One step's batch, split by the pool of its KV: what vLLM's stock kernel may see, and a plan for every executor.
//
// A block id carries the pool of its block in the high bits (vllm_adrenaline/kv/space.py): 0 is the decode engine's own
// memory, 1 to kMaxExecutors are remote, and those from kMapped on are memory of prefill engines that is mapped behind
// the decode engine's own. The stock kernel attends that too. The split is made once a step, in one pass. Nothing of it
// changes between layers.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include "../check.h"

namespace adrenaline::plan {

constexpr int kIndexBits = 24;
constexpr int32_t kIndexMask = (1 << kIndexBits) - 1;
constexpr int32_t kMaxExecutors = 63;
constexpr int32_t kMapped = kMaxExecutors + 1;
constexpr int32_t kNotMapped = -1;

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

// remote: the plans by executor. has_local: whether the stock kernel has rows to attend. num_mapped: how many of those
// lie in mapped memory. lost: rows in memory that should be mapped and is not.
struct Split {
  std::map<unsigned, RowsPlan> remote;
  bool has_local = false;
  uint32_t num_mapped = 0;
  std::vector<int32_t> lost;
};

// Where the tokens of a row are: `length` of them, the last ones from `begin` to `end` of the batch's tokens.
struct Row {
  const int32_t* table;
  int32_t begin, end, length;
};

// Return the slot of a token of `row` in its pool, with `base` blocks before that pool.
inline int64_t slot_of(const Batch& batch, const Row& row, int32_t token, int64_t base) {
  const int32_t position = row.length - (row.end - token);
  const int64_t block = base + (row.table[position / batch.block_size] & kIndexMask);
  return block * batch.block_size + position % batch.block_size;
}

// Split `batch`. `received`: per request, whether the k and v of its one token are in the cache already.
// `mapped_bases`: by prefill engine, the number that the first of its blocks has for the stock kernel; kNotMapped if its
// memory is not mapped. In `local_table` [R, width] and `local_lens` [R] is what the stock kernel may see. Mapped rows
// get their numbers there, and their slots in place. The rest is masked: remote and lost rows get block 0 and a sequence
// as long as their query; remote, lost and received tokens lose their slot, in place.
inline Split split(const Batch& batch, const std::vector<bool>& received, const std::vector<int64_t>& mapped_bases,
                   int32_t* local_table, int32_t* local_lens) {
  ADRENALINE_CHECK(batch.rows > 0 && batch.width > 0 && batch.block_size > 0, "an empty batch");
  Split result;
  for (uint32_t number = 0; number < batch.rows; ++number) {
    const Row row{batch.block_table + number * batch.table_stride, batch.query_start_loc[number],
                  batch.query_start_loc[number + 1], batch.seq_lens[number]};
    const int32_t query = row.end - row.begin;
    ADRENALINE_CHECK(row.begin >= 0 && query > 0 && static_cast<uint32_t>(row.end) <= batch.num_slots,
                     "a row has no tokens");
    ADRENALINE_CHECK(
        row.length >= query && static_cast<uint64_t>(row.length) <= uint64_t{batch.width} * batch.block_size,
        "a sequence is longer than its block table");
    int32_t* local = local_table + static_cast<size_t>(number) * batch.width;
    const int32_t pool = row.table[0] >> kIndexBits;
    if (pool == 0) {
      result.has_local = true;
      std::memcpy(local, row.table, batch.width * sizeof(int32_t));
      local_lens[number] = row.length;
      if (received[number]) batch.slot_mapping[row.begin] = -1;
      continue;
    }
    ADRENALINE_CHECK(pool > 0 && pool < kMapped + kMaxExecutors, "a block of no known pool");
    if (pool >= kMapped) {
      const size_t engine = static_cast<size_t>(pool - kMapped);
      if (const int64_t base = engine < mapped_bases.size() ? mapped_bases[engine] : kNotMapped; base != kNotMapped) {
        result.has_local = true;
        ++result.num_mapped;
        for (uint32_t i = 0; i < batch.width; ++i)  // ids of other pools are what is left of earlier requests
          local[i] = row.table[i] >> kIndexBits == pool ? static_cast<int32_t>(base + (row.table[i] & kIndexMask)) : 0;
        local_lens[number] = row.length;
        for (int32_t token = row.begin; token < row.end; ++token)
          batch.slot_mapping[token] = received[number] ? -1 : slot_of(batch, row, token, base);
        continue;
      }
    }
    std::memset(local, 0, batch.width * sizeof(int32_t));
    local_lens[number] = query;
    for (int32_t token = row.begin; token < row.end; ++token) batch.slot_mapping[token] = -1;
    if (pool >= kMapped) {
      result.lost.push_back(static_cast<int32_t>(number));
      continue;
    }
    RowsPlan& plan = result.remote[static_cast<unsigned>(pool - 1)];
    plan.rows.push_back(static_cast<int32_t>(number));
    plan.seq_lens.push_back(row.length);
    for (uint32_t i = 0; i < batch.width; ++i) plan.block_table.push_back(row.table[i] & kIndexMask);
    for (int32_t token = row.begin; token < row.end; ++token) {
      plan.slot_mapping.push_back(received[number] ? -1 : slot_of(batch, row, token, 0));
      plan.tokens.push_back(token);
    }
    plan.query_start_loc.push_back(static_cast<int32_t>(plan.tokens.size()));
  }
  return result;
}

}  // namespace adrenaline::plan
