// The layout of a channel: one shared memory file that joins one decode worker and one attention executor.
//
//   header (one page)   what each side announces, one cache line per writer
//   plan                query_start_loc, seq_lens, block_table, slot_mapping of the step
//   q, k, v             the rows of one layer, sent by the decode worker
//   out                 their attention output, written by the executor
//
// One slot serves all layers: a layer is sent only after the output of the layer before was taken. The executor's
// kernel reads and writes the slots themselves.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../check.h"
#include "../stamp.h"

namespace adrenaline::shm {

constexpr uint64_t kMagic = 0xAD2E0004;
constexpr size_t kPage = 4096;
constexpr size_t kLine = 64;

// What a channel is sized for; row sizes in bytes.
struct Shape {
  uint64_t max_rows, max_tokens, max_blocks;
  uint64_t q_row, kv_row, out_row;
};

// Byte offsets of the parts.
struct Layout {
  size_t query_start_loc, seq_lens, block_table, slot_mapping, q, k, v, out, total;
};

inline Layout layout_of(const Shape& s) {
  ADRENALINE_CHECK(s.max_rows > 0 && s.max_tokens > 0 && s.max_blocks > 0, "a channel needs rows, tokens and blocks");
  ADRENALINE_CHECK(s.q_row > 0 && s.kv_row > 0 && s.out_row > 0, "a channel needs row sizes");
  for (uint64_t count : {s.max_rows, s.max_tokens, s.max_blocks, s.q_row, s.kv_row, s.out_row})
    ADRENALINE_CHECK(count < (1u << 28), "a channel's sizes are bounded");
  Layout at{};
  size_t end = kPage;
  auto add = [&end](size_t bytes) {
    size_t begin = end;
    end += (bytes + kPage - 1) / kPage * kPage;
    return begin;
  };
  at.query_start_loc = add((s.max_rows + 1) * sizeof(int32_t));
  at.seq_lens = add(s.max_rows * sizeof(int32_t));
  at.block_table = add(s.max_rows * s.max_blocks * sizeof(int32_t));
  at.slot_mapping = add(s.max_tokens * sizeof(int64_t));
  at.q = add(s.max_tokens * s.q_row);
  at.k = add(s.max_tokens * s.kv_row);
  at.v = add(s.max_tokens * s.kv_row);
  at.out = add(s.max_tokens * s.out_row);
  at.total = end;
  return at;
}

// The size to which `count` rows or tokens of a plan are padded: the smallest power of two that fits, or the most there
// can be. So the shapes of a step are few, and what depends on them is made once (tensor views here, CUDA graphs
// elsewhere).
inline uint32_t bucket(uint64_t count, uint64_t most) {
  uint64_t size = 1;
  while (size < count) size *= 2;
  return static_cast<uint32_t>(size < most ? size : most);
}

// The first page of a channel.
struct Header {
  uint64_t magic;

  // Written by the decode worker.
  alignas(kLine) std::atomic<uint64_t> plan;
  std::atomic<uint64_t> sent;
  std::atomic<uint32_t> to_executor;    // futex: rung after an announcement if the executor sleeps
  std::atomic<uint32_t> decode_sleeps;  // 1: the decode worker is to be woken
  std::atomic<uint32_t> num_rows, padded_rows, padded_tokens;  // side by side: "counts" in Python
  std::atomic<uint32_t> left;  // 1: nothing is asked any more

  // Written by the executor.
  alignas(kLine) std::atomic<uint64_t> done;
  std::atomic<uint32_t> to_decode;        // futex
  std::atomic<uint32_t> executor_sleeps;  // 1: the executor is to be woken
  std::atomic<uint32_t> closed;  // 1: nothing is answered any more

  // Written by the executor, read once in a while: rows x layers, layers, nanoseconds spent on them.
  alignas(kLine) std::atomic<uint64_t> rows;
  std::atomic<uint64_t> layers;
  std::atomic<uint64_t> busy_ns;
};

static_assert(sizeof(Header) <= kPage && std::is_standard_layout_v<Header>);
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

}  // namespace adrenaline::shm
