// Any bytes in a channel: what one process writes there must never make the other one read or write elsewhere, or wait
// for ever. Built with ASan and UBSan and run by tests/unit/test_native.py; arguments: inputs, seed.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "../shm/decode_end.h"
#include "../shm/executor_end.h"

using namespace adrenaline::shm;
using adrenaline::stamp;

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

namespace {

const Shape kShape{4, 8, 3, 16, 8, 16};
constexpr uint64_t kEpoch = 5, kLayers = 2;
const auto kBlock = [](auto&& sleep) { sleep(); };
std::mt19937_64 random_bits;

// A value that is likely to be at a bound.
uint64_t odd() {
  constexpr uint64_t kValues[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 255, 256, 1u << 31, UINT32_MAX, UINT64_MAX};
  return random_bits() % 4 == 0 ? random_bits() : kValues[random_bits() % std::size(kValues)];
}

// A number of rows or tokens, which mostly fits.
uint32_t number() { return static_cast<uint32_t>(random_bits() % 4 == 0 ? odd() : random_bits() % 5); }

// The channel's memory and the executor's copy of the plan, each of exactly the size it should have.
struct Channel {
  std::unique_ptr<char, decltype(&std::free)> memory{
      static_cast<char*>(std::aligned_alloc(kPage, layout_of(kShape).total)), &std::free};
  std::vector<int32_t> starts = std::vector<int32_t>(kShape.max_rows + 1), lens = std::vector<int32_t>(kShape.max_rows),
                       table = std::vector<int32_t>(kShape.max_rows * kShape.max_blocks);
  std::vector<int64_t> slots = std::vector<int64_t>(kShape.max_tokens);
  Header& header = *reinterpret_cast<Header*>(memory.get());
  Channel() { std::memset(memory.get(), 0, layout_of(kShape).total); }
  PlanCopy copy() { return {starts.data(), lens.data(), table.data(), slots.data()}; }
};

// What a decode worker may have written there.
void write_as_decode_worker(Header& header, uint64_t step) {
  header.plan = random_bits() % 4 != 0 ? stamp(kEpoch, step, 0) : odd();
  header.sent = random_bits() % 2 != 0 ? stamp(kEpoch, step, random_bits() % 4) : odd();
  header.num_rows = number();
  header.padded_rows = number();
  header.padded_tokens = number();
  header.to_executor = static_cast<uint32_t>(odd());
  header.decode_sleeps = static_cast<uint32_t>(odd());
  header.left = random_bits() % 50 == 0 ? 1 : 0;
}

void the_executor_survives(uint64_t inputs) {
  uint64_t taken = 0, attended = 0;
  Channel channel;
  std::unique_ptr<ExecutorEnd> end;
  for (uint64_t step = 1; step <= inputs; ++step) {
    if (end == nullptr || channel.header.left != 0) {
      channel.header.magic = kMagic;
      channel.header.left = 0;
      channel.header.plan = 0;
      end = std::make_unique<ExecutorEnd>(channel.memory.get(), kShape, kEpoch, Service{kLayers, 1'000, true},
                                          channel.copy());
    }
    const uint64_t before = channel.header.plan;
    write_as_decode_worker(channel.header, step % 60'000);
    if (channel.header.plan == before) channel.header.left = 1;  // nothing came: it would sleep, as it should
    if (end->next_plan() == Status::ended || !end->take_plan()) continue;
    ++taken;
    EXPECT(end->num_rows() > 0 && end->num_rows() <= end->padded_rows() && end->padded_rows() <= kShape.max_rows);
    EXPECT(end->padded_tokens() > 0 && end->padded_tokens() <= kShape.max_tokens);
    for (uint64_t layer = 0; layer <= kLayers && end->next_layer(kBlock) == Status::ready; ++layer) {
      EXPECT(end->layer() == layer && layer < kLayers);
      ++attended;
    }
  }
  std::printf("executor: %lu inputs, %lu plans taken, %lu layers attended\n", inputs, taken, attended);
  EXPECT(taken > inputs / 20 && attended > inputs / 100);
}

void the_decode_worker_survives(uint64_t inputs) {
  uint64_t ready = 0;
  Channel channel;
  DecodeEnd end(channel.memory.get(), kShape, kEpoch);
  end.watch({}, true);
  adrenaline::plan::RowsPlan plan;
  plan.rows = {0};
  plan.query_start_loc = {0, 1};
  plan.seq_lens = {7};
  plan.block_table.assign(kShape.max_blocks, 1);
  plan.slot_mapping = {3};
  plan.tokens = {0};
  std::vector<char> bytes(kShape.q_row), out(kShape.out_row);
  for (uint64_t step = 1; step <= inputs; ++step) {
    end.begin(plan);
    for (uint64_t layer = 0; layer < kLayers; ++layer) {
      end.send(layer, plan.tokens, {bytes.data(), 0}, {bytes.data(), 0}, {bytes.data(), 0});
      const uint64_t answer = stamp(kEpoch, step, layer + 1);
      channel.header.done = random_bits() % 2 != 0 ? answer : odd();
      channel.header.closed = static_cast<uint32_t>(random_bits() % 3 == 0 ? odd() : 0);
      channel.header.to_decode = static_cast<uint32_t>(odd());
      channel.header.executor_sleeps = static_cast<uint32_t>(odd());
      const bool is_done = channel.header.done == answer, is_closed = channel.header.closed != 0;
      Deadline soon{now_ns() + 1'000, now_ns() + 1'000};
      const Status status = end.sleep_for(layer, soon);
      EXPECT(status == (is_done ? Status::ready : is_closed ? Status::gone : Status::late));
      if (status != Status::ready) break;
      end.take(plan.tokens, {out.data(), static_cast<int64_t>(kShape.out_row)});
      ++ready;
    }
  }
  std::printf("decode worker: %lu inputs, %lu layers taken\n", inputs, ready);
  EXPECT(ready > inputs / 10);
}

}  // namespace

int main(int count, char** arguments) {
  const uint64_t inputs = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 20'000;
  random_bits.seed(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0);
  the_executor_survives(inputs);
  the_decode_worker_survives(inputs);
  std::puts("ok");
}
