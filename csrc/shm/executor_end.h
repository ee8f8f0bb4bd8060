// The attention executor's end of a channel. Its kernels read q, k, v and write out in the slots themselves: only the
// plan is copied.
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

// How an executor serves: layers of a step, how long it waits for one, whether others need its core.
struct Service {
  uint64_t layers;
  int64_t timeout_ns;
  bool shared_core;
};

// The executor's end of one channel. For one thread, except for stop().
class ExecutorEnd {
 public:
  // `memory`: total bytes of layout_of(shape), mapped from the decode worker's file. `copy`: arrays as large as the
  // layout's. The caller keeps both.
  ExecutorEnd(void* memory, const Shape& shape, uint64_t epoch, const Service& service, const PlanCopy& copy)
      : header_(reinterpret_cast<Header*>(memory)),
        shape_(shape),
        at_(layout_of(shape)),
        epoch_(epoch),
        service_(service),
        layer_(service.layers),
        pace_(service.shared_core),
        copy_(copy) {
    ADRENALINE_CHECK(service.layers > 0 && service.layers <= kMaxLayers, "a model has 1 to 4094 layers");
    ADRENALINE_CHECK(header_->magic == kMagic, "this memory is no channel of this version");
    plan_ = header_->plan.load(std::memory_order_acquire);
  }

  // Sleep until there is a plan that was not seen yet: ready, or ended when stop() was called or the decode worker has
  // left. Takes no CPU time meanwhile.
  Status next_plan() {
    const auto ready = [this] { return has_ended() || header_->plan.load(std::memory_order_seq_cst) != plan_; };
    Deadline never{kForever, kForever};
    const Status status = sleep_until(ready, header_->to_executor, header_->executor_sleeps, never, {});
    if (has_ended()) return Status::ended;
    plan_ = header_->plan.load(std::memory_order_acquire);
    step_ = step_of(plan_);
    layer_ = service_.layers;  // none, until the plan is taken
    attends_ = false;
    return status;
  }

  // Copy the step's plan to where nobody else writes. False, and nothing is copied, if it does not fit this channel.
  // The copy is what is checked and what the kernels use: the decode worker may write into the channel at any time.
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
    header_->done.store(plan_, std::memory_order_seq_cst);  // the next one may be written (DecodeEnd::is_taken)
    layer_ = 0;
    return true;
  }

  uint32_t num_rows() const { return num_rows_; }
  uint32_t padded_rows() const { return padded_rows_; }
  uint32_t padded_tokens() const { return padded_tokens_; }
  uint64_t step() const { return step_; }

  // Announce the output of the layer that was attended, if there is one; then wait for q, k, v of the next. ready:
  // layer() is to be attended. ended: it was the last one, or the decode worker went on to another step, or stop() was
  // called. late: the decode worker sent nothing in time. `block` runs a function that waits, and lets go of the
  // interpreter's lock meanwhile.
  template <typename Block>
  Status next_layer(Block&& block) {
    int64_t clock = attends_ ? reply() : now_ns();
    if (layer_ == service_.layers) return Status::ended;
    Status status = Status::ready;
    block([&] { status = wait(clock); });
    attends_ = status == Status::ready;
    return status;
  }

  uint64_t layer() const { return layer_; }

  // Count a step whose layers did not go through this memory, and which took so long.
  void count_step(int64_t busy_ns) {
    add(header_->rows, num_rows_ * service_.layers);
    add(header_->layers, service_.layers);
    add(header_->busy_ns, static_cast<uint64_t>(busy_ns));
    layer_ = service_.layers;
  }

  // End the waits of this end. Any thread may call it.
  void stop() {
    stopped_.store(true, std::memory_order_seq_cst);
    ring(header_->to_executor, header_->executor_sleeps);
  }

  // End the waits of the decode worker. Only the thread that serves may call it, and it writes nothing afterwards.
  void close() {
    header_->closed.store(1, std::memory_order_seq_cst);
    ring(header_->to_decode, header_->decode_sleeps);
  }

 private:
  bool has_ended() const {
    return stopped_.load(std::memory_order_seq_cst) || header_->left.load(std::memory_order_seq_cst) != 0;
  }
  bool is_over() const { return has_ended() || header_->plan.load(std::memory_order_seq_cst) != plan_; }
  bool is_sent() const {
    return header_->sent.load(std::memory_order_seq_cst) == stamp(epoch_, step_, layer_ + 1);
  }

  // Announce the layer's output; return the time. What the decode worker waits for comes first. The time that the layer
  // took is added when nobody waits any more, so it may be a moment late. The counts are not.
  int64_t reply() {
    add(header_->rows, num_rows_);
    add(header_->layers, 1);
    header_->done.store(stamp(epoch_, step_, layer_ + 1), std::memory_order_seq_cst);
    ring(header_->to_decode, header_->decode_sleeps);
    const int64_t now = now_ns();
    add(header_->busy_ns, static_cast<uint64_t>(now - ready_at_));
    attends_ = false;
    ++layer_;
    return now;
  }

  // Wait for q, k, v of the layer. `clock`: the time now.
  Status wait(int64_t clock) {
    const int64_t began = clock;
    if (!spin([this] { return is_sent(); }, pace_.spin_ns(), clock)) {
      const auto ready = [this] { return is_sent() || is_over(); };
      Deadline deadline{began + service_.timeout_ns, began + service_.timeout_ns};
      const Status status = sleep_until(ready, header_->to_executor, header_->executor_sleeps, deadline, {});
      if (!is_sent()) return status == Status::ready ? Status::ended : status;
      clock = now_ns();
    }
    pace_.observe(clock - began);
    ready_at_ = clock;
    return Status::ready;
  }

  // Nobody else writes these, so no locked instruction is needed.
  static void add(std::atomic<uint64_t>& counter, uint64_t more) {
    counter.store(counter.load(std::memory_order_relaxed) + more, std::memory_order_relaxed);
  }

  Header* header_;
  Shape shape_;
  Layout at_;
  uint64_t epoch_;
  uint64_t plan_ = 0;
  uint64_t step_ = 0;
  Service service_;
  uint64_t layer_;         // awaited, or attended; as many as there are: no step is served
  bool attends_ = false;   // q, k, v of layer_ came, and its output was not announced
  int64_t ready_at_ = 0;
  std::atomic<bool> stopped_{false};
  Pace pace_;
  uint32_t num_rows_ = 0, padded_rows_ = 0, padded_tokens_ = 0;
  PlanCopy copy_;
};

}  // namespace adrenaline::shm
