// A channel between two processes with GPUs of one host: kernels store rows into the memory of the other process, and
// then an announcement; kernels of the other process wait for that. No host takes part in a layer.
//
// Each process has a memory that the other one has mapped, an inbox: an announcement, and rows. One slot serves all
// layers, as in shared memory (shm/layout.h): a layer is sent only after the output of the layer before was taken. What
// a launch needs to know of the step is in the process's own memory, so launches may be captured and replayed.
//
//   decode worker     begin, then for each layer: send q, k, v ... receive: await, take
//   executor          begin, then for each layer: await, (attend), publish
#pragma once

#include "../stamp.h"
#include "primitives.h"

namespace adrenaline::cuda {

// How an end is. ready: nothing failed. late: what was awaited did not come in time. closed: the other end said that
// nothing comes any more. stale: something of another life of the channel was announced. ahead: the other end has left
// the step. All but ready stay until the channel's life ends.
enum class ChannelStatus : uint32_t { kReady = 0, kLate = 1, kClosed = 2, kStale = 3, kAhead = 4 };

// What an end knows, in memory that the other process has not mapped. All zero at first. Times are in nanoseconds.
struct ChannelState {
  uint64_t step;       // of the channel's life, from 1
  uint64_t failed_at;  // the stamp that was awaited when the end failed; what was taken before it is good
  int64_t budget_ns;   // of all waits of this step together, so that many slow layers exhaust it as a stuck one does
  int64_t sent_at;     // when the layer was sent that is not awaited yet; 0: there is none
  int64_t local_ns;    // in this step, between sending a layer and waiting for it
  int64_t waited_ns;   // in this step, in waits
  uint32_t status;     // ChannelStatus
  uint32_t arrived;    // blocks of a launch of `send`; 0 between launches
};

// One end. `announced` is in the other's inbox, `awaited` in ours: 0 at first.
struct ChannelEnd {
  uint64_t* announced;
  const uint64_t* awaited;
  ChannelState* state;
  uint64_t epoch;     // 1 to kMaxEpoch: this life of the channel
  int64_t budget_ns;  // of a step that is begun with this
};

// Rows of a tensor, and of the inbox, where they are one after the other. Everything is a multiple of 16 bytes.
struct ChannelRows {
  char* tensor;
  char* inbox;
  int64_t stride;  // of the tensor, in bytes
  int32_t pieces;  // of 16 bytes in a row; 0: there is no such part
};

// A layer's rows: of q, k and v, or of the output. Row i of the inbox belongs to row tokens[i] of each tensor; -1: to
// none, and then nothing of it is read or written. tokens is null: row i to row i.
struct ChannelMessage {
  ChannelEnd end;
  ChannelRows parts[3];
  const int64_t* tokens;
  int32_t rows, layer;
};

// Work that an end which failed must not do: the plan of the step, int32 [count] (plan.h), null for none. All zeros say
// that no row has any token.
struct ChannelWork {
  int32_t* first_tile;
  int32_t count;
};

constexpr int kChannelThreads = 256;
constexpr int kPiecesEach = 4;  // that a thread copies at once
constexpr int kPauseNs = 20;    // between two looks

// Of 16 bytes; fewer than 2^31.
ADRENALINE_BOTH int pieces_in_row(const ChannelMessage& m) {
  return m.parts[0].pieces + m.parts[1].pieces + m.parts[2].pieces;
}

// Blocks that a message is copied by: one for as much as its threads copy at once, up to `most`.
inline int channel_blocks(const ChannelMessage& message, int most) {
  const int each = kChannelThreads * kPiecesEach, wanted = (message.rows * pieces_in_row(message) + each - 1) / each;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

class Channel {
 public:
  // Begin a step. One thread.
  static ADRENALINE_DEVICE void begin(const ChannelEnd& end) {
    device::store(&end.state->step, device::load(&end.state->step) + 1);
    device::store(&end.state->budget_ns, end.budget_ns);
    for (int64_t* time : {&end.state->sent_at, &end.state->local_ns, &end.state->waited_ns}) device::store(time, int64_t{0});
  }

  // Store the rows into the other's inbox, and announce them. An end that failed says that it closes, and stores none.
  static ADRENALINE_DEVICE void send(const ChannelMessage& m) {
    if (device::load(&m.end.state->status) != 0) {
      if (is_first()) device::store_release_system(m.end.announced, closing_stamp(m.end.epoch));
      return;
    }
    for_pieces(m, [&](const ChannelRows& part, int row, int64_t token, int piece) {
      return Move{part.tensor + token * part.stride + piece * 16, inbox_of(part, row, piece)};
    }, [](const char* from) { return device::load(reinterpret_cast<const Piece*>(from)); },
       [](char* to, const Piece& x) { device::store_for_peer(reinterpret_cast<Piece*>(to), x); });
    device::barrier();  // the block's rows are stored
    if (device::thread_index() != 0) return;
    device::fence_system();  // releases them: to the block that comes last, and through that to the other process
    const bool is_last = device::atomic_increment(&m.end.state->arrived) + 1 ==
                         static_cast<uint32_t>(device::block_count());
    if (!is_last) return;
    device::fence_system();  // acquires what the other blocks released before they counted
    device::store(&m.end.state->arrived, 0u);
    device::store_release_system(m.end.announced, wanted(m.end, m.layer));
    device::store(&m.end.state->sent_at, device::time_ns());
  }

  // Wait for the other end's announcement of a layer. If it does not come, note why, for the rest of the channel's life,
  // and take the work away. One thread.
  static ADRENALINE_DEVICE void await(const ChannelEnd& end, int layer, const ChannelWork& work) {
    uint32_t status = device::load(&end.state->status);
    if (status == 0) {
      const uint64_t stamp = wanted(end, layer);
      status = static_cast<uint32_t>(timed_wait(end, stamp));
      if (status == 0) return;
      device::store(&end.state->status, status);
      device::store(&end.state->failed_at, stamp);
    }
    for (int i = 0; i < work.count; ++i) device::store(work.first_tile + i, 0);
  }

  // Announce what kernels before this one stored into the other's inbox. One thread.
  static ADRENALINE_DEVICE void publish(const ChannelEnd& end, int layer) {
    const bool failed = device::load(&end.state->status) != 0;
    device::fence_system();  // those kernels have ended, so their stores are ours
    device::store_release_system(end.announced, failed ? closing_stamp(end.epoch) : wanted(end, layer));
  }

  // Copy the rows from our inbox, behind `await`. An end that failed makes them zero.
  static ADRENALINE_DEVICE void take(const ChannelMessage& m) {
    const bool failed = device::load(&m.end.state->status) != 0;
    for_pieces(m, [&](const ChannelRows& part, int row, int64_t token, int piece) {
      return Move{inbox_of(part, row, piece), part.tensor + token * part.stride + piece * 16};
    }, [failed](const char* from) {
      return failed ? Piece{} : device::load_from_peer(reinterpret_cast<const Piece*>(from));
    }, [](char* to, const Piece& x) { device::store(reinterpret_cast<Piece*>(to), x); });
  }

  // Say that nothing comes any more. One thread.
  static ADRENALINE_DEVICE void close(const ChannelEnd& end) {
    device::store_release_system(end.announced, closing_stamp(end.epoch));
  }

 private:
  struct Move {
    const char* from;
    char* to;
  };

  static ADRENALINE_DEVICE bool is_first() { return device::block_index() == 0 && device::thread_index() == 0; }

  static ADRENALINE_DEVICE uint64_t wanted(const ChannelEnd& end, int layer) {
    return stamp(end.epoch, device::load(&end.state->step), static_cast<uint64_t>(layer) + 1);
  }

  // Wait for a stamp for what is left of the step's time, and count what this took.
  static ADRENALINE_DEVICE ChannelStatus timed_wait(const ChannelEnd& end, uint64_t stamp) {
    ChannelState& state = *end.state;
    const int64_t began = device::time_ns(), sent_at = device::load(&state.sent_at);
    const int64_t waited = device::load(&state.waited_ns);
    if (sent_at != 0) {
      device::store(&state.local_ns, device::load(&state.local_ns) + began - sent_at);
      device::store(&state.sent_at, int64_t{0});
    }
    const ChannelStatus status = wait_for(end, stamp, began + device::load(&state.budget_ns) - waited);
    device::store(&state.waited_ns, waited + device::time_ns() - began);
    return status;
  }

  static ADRENALINE_DEVICE ChannelStatus wait_for(const ChannelEnd& end, uint64_t stamp, int64_t deadline) {
    for (;;) {
      // First the time, then the look: what came in time is seen, even if we were held up.
      const bool is_late = device::time_ns() >= deadline;
      const uint64_t seen = device::load_acquire_system(end.awaited);
      if (seen == stamp) return ChannelStatus::kReady;
      if (seen == closing_stamp(end.epoch)) return ChannelStatus::kClosed;
      if (seen != 0 && epoch_of(seen) != end.epoch) return ChannelStatus::kStale;
      if (seen > stamp) return ChannelStatus::kAhead;
      if (is_late) return ChannelStatus::kLate;
      device::pause(kPauseNs);
    }
  }

  static ADRENALINE_DEVICE char* inbox_of(const ChannelRows& part, int row, int piece) {
    return part.inbox + (int64_t{row} * part.pieces + piece) * 16;
  }

  // Copy all pieces of all parts: each thread loads some, then stores them.
  template <typename Where, typename Load, typename Store>
  static ADRENALINE_DEVICE void for_pieces(const ChannelMessage& m, const Where& where, const Load& load,
                                           const Store& store) {
    const int in_row = pieces_in_row(m), all = m.rows * in_row, threads = device::block_count() * kChannelThreads;
    for (int at = device::block_index() * kChannelThreads + device::thread_index(); at < all;
         at += threads * kPiecesEach) {
      Move moves[kPiecesEach];
      Piece found[kPiecesEach];
      ADRENALINE_UNROLL
      for (int i = 0; i < kPiecesEach; ++i) {
        moves[i] = {nullptr, nullptr};
        const int number = at + i * threads;
        if (number >= all) continue;
        const int row = number / in_row;
        const int64_t token = m.tokens == nullptr ? row : device::load(m.tokens + row);
        if (token < 0) continue;
        int piece = number - row * in_row, part = 0;
        while (piece >= m.parts[part].pieces) piece -= m.parts[part++].pieces;
        moves[i] = where(m.parts[part], row, token, piece);
        found[i] = load(moves[i].from);
      }
      ADRENALINE_UNROLL
      for (int i = 0; i < kPiecesEach; ++i)
        if (moves[i].to != nullptr) store(moves[i].to, found[i]);
    }
  }
};

}  // namespace adrenaline::cuda
