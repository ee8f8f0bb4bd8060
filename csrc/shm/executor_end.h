// The attention executor's end of a channel. Its kernel works on the slots themselves: nothing is copied here.
#pragma once

#include <cstring>

#include "layout.h"
#include "wait.h"

namespace adrenaline::shm {

// Where an executor keeps its copy of a step's plan: the arrays of the layout, in memory that nobody else writes.
struct PlanCopy {
  int32_t *query_start_loc, *seq_lens, *block_table;
  int64_t* slot_mapping;
};

class ExecutorEnd {
 public:
  // `memory`: total bytes of layout_of(shape), mapped from the decode worker's file. `copy`: as large as the layout's
  // arrays. Both kept by the caller.
  ExecutorEnd(void* memory, const Shape& shape, uint64_t epoch, bool shared_core, const PlanCopy& copy)
      : header_(reinterpret_cast<Header*>(memory)),
        shape_(shape),
        at_(layout_of(shape)),
        epoch_(epoch),
        pace_(shared_core),
        copy_(copy) {
    ADRENALINE_CHECK(header_->magic == kMagic, "this memory is no channel of this version");
    plan_ = header_->plan.load(std::memory_order_acquire);
  }

  // Sleep until there is a plan that was not taken yet; it takes no CPU time meanwhile. ended: stop() was called.
  Status next_plan() {
    const auto ready = [this] { return has_ended() || header_->plan.load(std::memory_order_acquire) != plan_; };
    const Status status = sleep_until(ready, header_->to_executor, header_->executor_sleeps, kForever, -1);
    if (has_ended()) return Status::ended;
    plan_ = header_->plan.load(std::memory_order_acquire);
    step_ = step_of(plan_);
    ready_at_ = now_ns();
    return status;
  }

  // Copy the step's plan, whose sizes fit this channel, to where nobody else writes; whether it does. What is checked
  // and what the kernels use is the copy: the channel is the decode worker's to write, at any time.
  bool take_plan() {
    const Header& h = *header_;
    num_rows_ = h.num_rows.load(std::memory_order_relaxed);
    padded_rows_ = h.padded_rows.load(std::memory_order_relaxed);
    padded_tokens_ = h.padded_tokens.load(std::memory_order_relaxed);
    const bool fits = plan_ == stamp(epoch_, step_, 0) && num_rows_ > 0 && num_rows_ <= padded_rows_ &&
                      padded_rows_ <= shape_.max_rows && padded_tokens_ > 0 && padded_tokens_ <= shape_.max_tokens;
    if (!fits) return false;
    const char* from = reinterpret_cast<const char*>(header_);
    auto copy = [from](auto* to, size_t at, size_t count) { std::memcpy(to, from + at, count * sizeof(*to)); };
    copy(copy_.query_start_loc, at_.query_start_loc, padded_rows_ + 1);
    copy(copy_.seq_lens, at_.seq_lens, padded_rows_);
    copy(copy_.block_table, at_.block_table, padded_rows_ * shape_.max_blocks);
    copy(copy_.slot_mapping, at_.slot_mapping, padded_tokens_);
    return true;
  }

  uint32_t num_rows() const { return num_rows_; }
  uint32_t padded_rows() const { return padded_rows_; }
  uint32_t padded_tokens() const { return padded_tokens_; }
  uint64_t step() const { return step_; }

  bool spin_for(uint64_t layer) {
    waits_since_ = now_ns();
    return spin([this, layer] { return is_sent(layer); }, pace_.spin_ns());
  }

  Status sleep_for(uint64_t layer, int64_t timeout_ns) {
    return sleep_until([this, layer] { return is_sent(layer) || is_over(); }, header_->to_executor,
                       header_->executor_sleeps, waits_since_ + timeout_ns, -1);
  }

  // After a wait for `layer`: ready, or ended when the decode worker went on to another step, or is to be left.
  Status arrived(uint64_t layer) {
    if (!is_sent(layer)) return Status::ended;
    ready_at_ = now_ns();
    pace_.observe(ready_at_ - waits_since_);
    return Status::ready;
  }

  // Announce that the layer's output is in its slot; count what was attended, and the time since it arrived.
  void reply(uint64_t layer, uint64_t rows) {
    header_->rows.fetch_add(rows, std::memory_order_relaxed);
    header_->layers.fetch_add(1, std::memory_order_relaxed);
    header_->busy_ns.fetch_add(static_cast<uint64_t>(now_ns() - ready_at_), std::memory_order_relaxed);
    header_->done.store(stamp(epoch_, step_, layer + 1), std::memory_order_release);
    ring(header_->to_decode, header_->decode_sleeps);
  }

  // From any thread: the waits of this end are over.
  void stop() {
    stopped_.store(true, std::memory_order_seq_cst);
    ring(header_->to_executor, header_->executor_sleeps);
  }

  // From the thread that serves, which writes nothing after this: the waits of the decode worker are over.
  void close() {
    header_->closed.store(1, std::memory_order_seq_cst);
    ring(header_->to_decode, header_->decode_sleeps);
  }

 private:
  bool has_ended() const { return stopped_.load(std::memory_order_seq_cst); }
  bool is_over() const { return has_ended() || header_->plan.load(std::memory_order_acquire) != plan_; }
  bool is_sent(uint64_t layer) const {
    return header_->sent.load(std::memory_order_acquire) == stamp(epoch_, step_, layer + 1);
  }

  Header* header_;
  Shape shape_;
  Layout at_;
  uint64_t epoch_;
  uint64_t plan_ = 0;
  uint64_t step_ = 0;
  int64_t waits_since_ = 0;
  int64_t ready_at_ = 0;
  std::atomic<bool> stopped_{false};
  Pace pace_;
  uint32_t num_rows_ = 0, padded_rows_ = 0, padded_tokens_ = 0;
  PlanCopy copy_;
};

}  // namespace adrenaline::shm
