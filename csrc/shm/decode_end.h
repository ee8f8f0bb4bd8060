// The decode worker's end of a channel, and all of them together as one step sees them.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../plan/split.h"
#include "layout.h"
#include "wait.h"

namespace adrenaline::shm {

// Rows of a tensor: where the first begins and how many bytes lie between two of them.
struct Rows {
  const char* data;
  int64_t stride;
};

struct MutableRows {
  char* data;
  int64_t stride;
};

// The decode worker's end of the channel to one executor. For one thread.
class DecodeEnd {
 public:
  // `memory`: total bytes of layout_of(shape), zeroed, kept by the caller. `epoch`: 1 to kMaxEpoch, this channel's
  // life.
  DecodeEnd(void* memory, const Shape& shape, uint64_t epoch)
      : base_(static_cast<char*>(memory)),
        header_(reinterpret_cast<Header*>(memory)),
        shape_(shape),
        at_(layout_of(shape)),
        epoch_(epoch) {
    ADRENALINE_CHECK(epoch > 0 && epoch <= kMaxEpoch, "an epoch has 16 bits and is not 0");
    header_->magic = kMagic;
  }

  // Say which process to watch while waiting, and whether others need our core. To be called before the first wait.
  void watch(const Peer& peer, bool shared_core) {
    peer_ = peer;
    pace_ = Pace(shared_core);
  }

  // Begin a step: publish its plan, padded with rows of no token, and wake the executor.
  void begin(const plan::RowsPlan& plan) {
    const size_t rows = plan.rows.size(), tokens = plan.tokens.size();
    ADRENALINE_CHECK(rows > 0 && rows <= shape_.max_rows, "step plan has too many rows");
    ADRENALINE_CHECK(tokens > 0 && tokens <= shape_.max_tokens, "step plan has too many tokens");
    ADRENALINE_CHECK(plan.block_table.size() == rows * shape_.max_blocks, "block table is not as wide as the channel's");
    const uint32_t padded_rows = bucket(rows, shape_.max_rows), padded_tokens = bucket(tokens, shape_.max_tokens);
    put(at_.query_start_loc, plan.query_start_loc, padded_rows + 1, static_cast<int32_t>(tokens));
    put(at_.seq_lens, plan.seq_lens, padded_rows, 0);
    put(at_.block_table, plan.block_table, padded_rows * shape_.max_blocks, 0);
    put(at_.slot_mapping, plan.slot_mapping, padded_tokens, int64_t{-1});
    header_->num_rows.store(static_cast<uint32_t>(rows), std::memory_order_relaxed);
    header_->padded_rows.store(padded_rows, std::memory_order_relaxed);
    header_->padded_tokens.store(padded_tokens, std::memory_order_relaxed);
    ++step_;
    header_->plan.store(stamp(epoch_, step_, 0), std::memory_order_seq_cst);
    ring(header_->to_executor, header_->executor_sleeps);
  }

  // Pack q, k and v of these tokens of the batch, and announce the layer.
  void send(uint64_t layer, const std::vector<int64_t>& tokens, const Rows& q, const Rows& k, const Rows& v) {
    pack(base_ + at_.q, q, shape_.q_row, tokens);
    pack(base_ + at_.k, k, shape_.kv_row, tokens);
    pack(base_ + at_.v, v, shape_.kv_row, tokens);
    header_->sent.store(stamp(epoch_, step_, layer + 1), std::memory_order_seq_cst);
    ring(header_->to_executor, header_->executor_sleeps);
  }

  // Spin for the layer's output; return whether it is there. `clock` as in spin().
  bool spin_for(uint64_t layer, int64_t& clock) {
    return spin([this, layer] { return is_done(layer) || is_closed(); }, pace_.spin_ns(), clock) && is_done(layer);
  }

  // Sleep until the layer's output is there: ready, late, or gone (the executor ended or closed the channel).
  Status sleep_for(uint64_t layer, Deadline& deadline) {
    const Status status = sleep_until([this, layer] { return is_done(layer) || is_closed(); }, header_->to_decode,
                                      header_->decode_sleeps, deadline, peer_);
    return status == Status::ready && !is_done(layer) ? Status::gone : status;
  }

  // Ask nothing any more. The executor leaves the step that it may be in, and closes the channel.
  void leave() {
    header_->left.store(1, std::memory_order_seq_cst);
    ring(header_->to_executor, header_->executor_sleeps);
  }

  // Learn how long a wait took.
  void observe(int64_t waited_ns) { pace_.observe(waited_ns); }

  // Copy the layer's output to these tokens of the batch.
  void take(const std::vector<int64_t>& tokens, const MutableRows& out) const {
    const char* from = base_ + at_.out;
    for (size_t i = 0; i < tokens.size(); ++i)
      std::memcpy(out.data + tokens[i] * out.stride, from + i * shape_.out_row, shape_.out_row);
  }

  const Header& header() const { return *header_; }

  // Whether the executor has copied the last plan, so that another may be published. A step whose layers go through this
  // memory need not ask: its output says so.
  bool is_taken() const {
    return step_ == 0 || header_->done.load(std::memory_order_seq_cst) >= stamp(epoch_, step_, 0);
  }

  // Whether the executor has said that it answers nothing any more.
  bool is_closed() const { return header_->closed.load(std::memory_order_seq_cst) != 0; }

 private:
  bool is_done(uint64_t layer) const {
    return header_->done.load(std::memory_order_seq_cst) == stamp(epoch_, step_, layer + 1);
  }

  template <typename T>
  void put(size_t at, const std::vector<T>& values, size_t padded, T padding) {
    T* to = reinterpret_cast<T*>(base_ + at);
    std::copy(values.begin(), values.end(), to);
    std::fill(to + values.size(), to + padded, padding);
  }

  static void pack(char* to, const Rows& from, size_t row, const std::vector<int64_t>& tokens) {
    for (size_t i = 0; i < tokens.size(); ++i) std::memcpy(to + i * row, from.data + tokens[i] * from.stride, row);
  }

  char* base_;
  Header* header_;
  Shape shape_;
  Layout at_;
  uint64_t epoch_;
  uint64_t step_ = 0;
  Peer peer_;
  Pace pace_{true};
};

// What a decode worker's steps cost it, summed up since it started (nanoseconds).
struct StepTimes {
  int64_t local_ns = 0;  // between a layer's send and the first receive: local attention
  int64_t wait_ns = 0;   // waiting for executors with nothing else to do
};

// All executors of one step. A layer is one call each way, whatever their number: rows are sent to all before any is
// waited for. An executor that fails stays failed until the next step, and its rows become zero.
//
// Every executor has one budget of waiting for all layers of a step. So many slow layers exhaust it as a stuck one does,
// and what the decode worker itself computes between them does not. What was lost to executors that failed is taken off
// the budgets of the others, but kGraceNs of them is left (or all, if that is shorter). So several that hang cost a step
// little more than one.
class StepEnds {
 public:
  static constexpr int64_t kGraceNs = 300'000'000;

  // Begin a step without executors. Each of those that are added is waited for `soft_ns`, then up to `hard_ns` in all as
  // long as it works (wait.h, Deadline).
  void begin(int64_t soft_ns, int64_t hard_ns) {
    entries_.clear();
    soft_ns_ = soft_ns;
    hard_ns_ = hard_ns;
    lost_ns_ = 0;
  }

  // Add an executor to the step and publish its plan. `end`: null when the executor is not there. `out_row`: bytes of a
  // row of output.
  void add(unsigned executor, DecodeEnd* end, const plan::RowsPlan& plan, size_t out_row) {
    if (end != nullptr) end->begin(plan);
    entries_.push_back({executor, end, plan.tokens, out_row, 0});
  }

  // Send a layer to all executors.
  void send(uint64_t layer, const Rows& q, const Rows& k, const Rows& v) {
    for (auto& entry : entries_)
      if (entry.end != nullptr) entry.end->send(layer, entry.tokens, q, k, v);
    sent_at_ = now_ns();
  }

  // Fill the offloaded rows of `out`; return the executors that failed in this layer, as bits. `block` runs a function
  // that sleeps, and lets go of the interpreter's lock meanwhile.
  template <typename Block>
  uint64_t receive(uint64_t layer, const MutableRows& out, Block&& block) {
    uint64_t failed = 0;
    int64_t clock = now_ns();
    const int64_t began = clock;
    times_.local_ns += began - sent_at_;
    for (auto& entry : entries_) {
      if (entry.end != nullptr) {
        const int64_t before = clock;
        Status status = Status::ready;
        if (!entry.end->spin_for(layer, clock)) {
          const int64_t budget = std::max(hard_ns_ - lost_ns_, std::min(hard_ns_, kGraceNs));
          const int64_t hard = began + budget - entry.waited_ns;
          Deadline deadline{std::min(began + soft_ns_ - entry.waited_ns, hard), hard};
          block([&] { status = entry.end->sleep_for(layer, deadline); });
          clock = now_ns();
          entry.waited_ns -= deadline.hard - hard;  // overslept
        }
        entry.waited_ns += clock - before;
        times_.wait_ns += clock - before;
        if (status == Status::ready) {
          entry.end->observe(clock - before);
          entry.end->take(entry.tokens, out);
        } else {
          lost_ns_ += clock - before;
          entry.end = nullptr;
          failed |= uint64_t{1} << entry.executor;
        }
        if (&entry != &entries_.back()) clock = now_ns();  // taking the output was no waiting
      }
      if (entry.end == nullptr)
        for (int64_t token : entry.tokens) std::memset(out.data + token * out.stride, 0, entry.out_row);
    }
    return failed;
  }

  const StepTimes& times() const { return times_; }

 private:
  struct Entry {
    unsigned executor;
    DecodeEnd* end;
    std::vector<int64_t> tokens;
    size_t out_row;
    int64_t waited_ns;  // in this step
  };

  std::vector<Entry> entries_;
  StepTimes times_;
  int64_t soft_ns_ = 0, hard_ns_ = 0;
  int64_t lost_ns_ = 0;  // in this step, waiting for executors that failed
  int64_t sent_at_ = 0;
};

}  // namespace adrenaline::shm
