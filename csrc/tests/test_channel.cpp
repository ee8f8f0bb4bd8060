// Both ends of the channel against each other. Built and run by tests/unit/test_native.py: plainly, with ASan and UBSan,
// and with TSan (which is why both ends are threads here; killing processes is tested from Python).
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>

#include "../shm/decode_end.h"
#include "../shm/executor_end.h"

using namespace adrenaline::shm;
using adrenaline::stamp;
using adrenaline::plan::RowsPlan;
using adrenaline::stamp;

#define EXPECT(condition)                                                     \
  do {                                                                        \
    if (!(condition)) {                                                       \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);    \
      std::exit(1);                                                           \
    }                                                                         \
  } while (0)

namespace {

constexpr int64_t kSecond = 1'000'000'000;
const Shape kShape{8, 16, 3, 64, 32, 64};

struct Memory {
  size_t total = layout_of(kShape).total;
  char* data = static_cast<char*>(mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  ~Memory() { munmap(data, total); }
};

// An executor's end that keeps its copy of the plan itself.
struct End : private std::vector<int64_t>, ExecutorEnd {
  End(void* memory, uint64_t epoch, uint64_t layers, bool shared_core, int64_t timeout_ns = 10 * kSecond)
      : std::vector<int64_t>(4 * 64), ExecutorEnd(memory, kShape, epoch, {layers, timeout_ns, shared_core}, copy()) {}
  PlanCopy copy() {
    int64_t* at = data();
    auto ints = [at](int part) { return reinterpret_cast<int32_t*>(at + 64 * part); };
    return {ints(0), ints(1), ints(2), at + 64 * 3};
  }
};

RowsPlan plan_of(const std::vector<int64_t>& tokens) {
  RowsPlan plan;
  for (int64_t token : tokens) {
    plan.rows.push_back(static_cast<int32_t>(token));
    plan.query_start_loc.push_back(static_cast<int32_t>(plan.rows.size()));
    plan.seq_lens.push_back(7);
    plan.block_table.insert(plan.block_table.end(), kShape.max_blocks, 1);
    plan.slot_mapping.push_back(3);
    plan.tokens.push_back(token);
  }
  return plan;
}

// q, k and v of 16 tokens, side by side as in a model's projection.
struct Activations {
  static constexpr int64_t kStride = 128;
  std::vector<char> bytes = std::vector<char>(16 * kStride);
  Rows q() const { return {bytes.data(), kStride}; }
  Rows k() const { return {bytes.data() + 64, kStride}; }
  Rows v() const { return {bytes.data() + 96, kStride}; }
};

// The executor's part: output byte = q byte + k byte.
void attend(char* memory, uint32_t tokens) {
  const Layout at = layout_of(kShape);
  for (uint32_t t = 0; t < tokens; ++t)
    for (uint64_t i = 0; i < kShape.out_row; ++i)
      memory[at.out + t * kShape.out_row + i] =
          static_cast<char>(memory[at.q + t * kShape.q_row + i] + memory[at.k + t * kShape.kv_row + i % kShape.kv_row]);
}

const auto kBlock = [](auto&& sleep) { sleep(); };

void serve(char* memory, ExecutorEnd& end) {
  while (end.next_plan() != Status::ended) {
    EXPECT(end.take_plan());
    while (end.next_layer(kBlock) == Status::ready) attend(memory, end.padded_tokens());
  }
}

void many_steps_over_three_executors(int count) {
  Memory memory[3];
  constexpr uint64_t kLayers = 3;
  DecodeEnd first(memory[0].data, kShape, 11), second(memory[1].data, kShape, 12), third(memory[2].data, kShape, 13);
  first.watch({}, true);
  second.watch({}, false);
  third.watch({}, true);
  End one(memory[0].data, 11, kLayers, true), two(memory[1].data, 12, kLayers, false),
      three(memory[2].data, 13, kLayers, true);
  std::thread a([&] { serve(memory[0].data, one); }), b([&] { serve(memory[1].data, two); }),
      c([&] { serve(memory[2].data, three); });
  std::mt19937 random(3);
  StepEnds steps;
  Activations in;
  std::vector<char> out(16 * 64);
  for (int step = 0; step < count; ++step) {
    std::vector<int64_t> left, right, far;
    for (int64_t token = 0; token < 16; ++token) {
      const auto which = random() % 3;
      auto& side = which == 0U ? left : which == 1U ? right : far;
      if (random() % 3 != 0U && side.size() < 8) side.push_back(token);
    }
    steps.begin(60 * kSecond, 60 * kSecond);
    if (!left.empty()) steps.add(0, &first, plan_of(left), kShape.out_row);
    if (!right.empty()) steps.add(1, &second, plan_of(right), kShape.out_row);
    if (!far.empty()) steps.add(2, &third, plan_of(far), kShape.out_row);
    for (uint64_t layer = 0; layer < kLayers; ++layer) {
      for (char& byte : in.bytes) byte = static_cast<char>(random());
      std::fill(out.begin(), out.end(), 'x');
      steps.send(layer, in.q(), in.k(), in.v());
      EXPECT(steps.receive(layer, {out.data(), 64}, kBlock) == 0);
      for (int64_t token = 0; token < 16; ++token) {
        bool remote = false;
        for (int64_t t : left) remote |= t == token;
        for (int64_t t : right) remote |= t == token;
        for (int64_t t : far) remote |= t == token;
        for (int64_t i = 0; i < 64; ++i) {
          const char sum = static_cast<char>(in.bytes[token * 128 + i] + in.bytes[token * 128 + 64 + i % 32]);
          EXPECT(out[token * 64 + i] == (remote ? sum : 'x'));
        }
      }
    }
  }
  one.stop();
  two.stop();
  three.stop();
  a.join();
  b.join();
  c.join();
  EXPECT(steps.times().local_ns > 0);
}

// One of three stops and closes at any moment, as on SIGTERM: its rows are lost, those of the others are not.
void an_executor_that_ends_costs_the_others_nothing(int count) {
  for (int round = 0; round < count; ++round) {
    Memory memory[3];
    std::vector<std::unique_ptr<DecodeEnd>> ends;
    std::vector<std::unique_ptr<End>> executors;
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
      const auto epoch = static_cast<uint64_t>(20 + i);
      ends.push_back(std::make_unique<DecodeEnd>(memory[i].data, kShape, epoch));
      ends[i]->watch({}, true);
      executors.push_back(std::make_unique<End>(memory[i].data, epoch, 2, true));
      threads.emplace_back([data = memory[i].data, end = executors[i].get()] {
        serve(data, *end);
        end->close();
      });
    }
    std::thread ending([&] {
      for (int spin = 0; spin < round * 100; ++spin) cpu_pause();
      executors[1]->stop();
    });
    StepEnds steps;
    Activations in;
    std::vector<char> out(16 * 64);
    uint64_t failed = 0;
    for (int step = 0; step < 30; ++step) {
      steps.begin(60 * kSecond, 60 * kSecond);
      for (unsigned i = 0; i < 3; ++i)
        steps.add(i, i == 1 && failed != 0 ? nullptr : ends[i].get(), plan_of({i}), kShape.out_row);
      for (uint64_t layer = 0; layer < 2; ++layer) {
        for (char& byte : in.bytes) byte = static_cast<char>(1 + layer);
        steps.send(layer, in.q(), in.k(), in.v());
        failed |= steps.receive(layer, {out.data(), 64}, kBlock);
        EXPECT(out[0] == static_cast<char>(2 + 2 * layer) && out[2 * 64] == out[0]);
        EXPECT(out[64] == (failed != 0 ? 0 : out[0]));
      }
    }
    EXPECT(failed == 0 || failed == 2);
    ending.join();
    for (auto& end : executors) end->stop();
    for (auto& thread : threads) thread.join();
  }
}

void a_stale_stamp_is_never_taken() {
  Memory memory;
  DecodeEnd decode(memory.data, kShape, 5);
  decode.watch({}, true);
  const RowsPlan plan = plan_of({0});
  auto* header = reinterpret_cast<Header*>(memory.data);
  decode.begin(plan);
  Activations in;
  decode.send(0, plan.tokens, in.q(), in.k(), in.v());
  for (uint64_t wrong : {stamp(5, 1, 2), stamp(5, 2, 1), stamp(5, 0, 1), stamp(6, 1, 1), uint64_t{0}, ~uint64_t{0}}) {
    header->done.store(wrong);
    int64_t clock = now_ns();
    EXPECT(!decode.spin_for(0, clock));
    Deadline soon{now_ns() + kSecond / 100, now_ns() + kSecond / 100};
    EXPECT(decode.sleep_for(0, soon) == Status::late);
  }
  header->done.store(stamp(5, 1, 1));
  int64_t clock = now_ns();
  const int64_t before = clock;
  EXPECT(decode.spin_for(0, clock) && clock == before);
}

void layers_are_answered_once_each_and_in_order() {
  Memory memory;
  DecodeEnd decode(memory.data, kShape, 5);
  End end(memory.data, 5, 2, true, kSecond / 100);
  auto* header = reinterpret_cast<Header*>(memory.data);
  EXPECT(end.next_layer(kBlock) == Status::ended);  // there is no step
  EXPECT(decode.is_taken());  // there was no plan
  decode.begin(plan_of({0, 3}));
  EXPECT(end.next_plan() == Status::ready);
  EXPECT(end.next_layer(kBlock) == Status::ended);  // nor is there before its plan was taken
  EXPECT(!decode.is_taken());
  EXPECT(end.take_plan() && end.next_layer(kBlock) == Status::late && header->done == stamp(5, 1, 0));
  EXPECT(decode.is_taken());
  for (uint64_t wrong : {stamp(5, 1, 2), stamp(5, 2, 1), stamp(6, 1, 1)}) {
    header->sent.store(wrong);
    EXPECT(end.next_layer(kBlock) == Status::late && header->done == stamp(5, 1, 0));
  }
  header->sent.store(stamp(5, 1, 1));
  EXPECT(end.next_layer(kBlock) == Status::ready && end.layer() == 0 && header->done == stamp(5, 1, 0));
  EXPECT(end.next_layer(kBlock) == Status::late && header->done == stamp(5, 1, 1) && header->layers == 1);
  EXPECT(end.next_layer(kBlock) == Status::late && header->layers == 1);  // announced once
  header->sent.store(stamp(5, 1, 2));
  EXPECT(end.next_layer(kBlock) == Status::ready && end.layer() == 1);
  EXPECT(end.next_layer(kBlock) == Status::ended && header->done == stamp(5, 1, 2));  // that was the last
  EXPECT(decode.is_taken());
  EXPECT(end.next_layer(kBlock) == Status::ended && header->layers == 2 && header->rows == 4 && header->busy_ns > 0);
  decode.begin(plan_of({0}));
  EXPECT(end.next_plan() == Status::ready && end.take_plan());
  decode.begin(plan_of({1}));
  EXPECT(end.next_layer(kBlock) == Status::ended && header->done == stamp(5, 2, 0));  // left for another step
  EXPECT(end.next_plan() == Status::ready && end.take_plan());
  end.count_step(7);  // its layers went another way
  EXPECT(header->layers == 4 && header->rows == 6 && end.next_layer(kBlock) == Status::ended);
}

void an_end_that_sleeps_can_be_stopped_at_any_moment() {
  for (int i = 0; i < 200; ++i) {
    Memory memory;
    DecodeEnd decode(memory.data, kShape, 5);
    End end(memory.data, 5, 2, true);
    std::thread thread([&] { serve(memory.data, end); });
    if (i % 2 == 0) decode.begin(plan_of({1}));  // it waits for a layer, not for a plan
    for (int spin = 0; spin < i * 50; ++spin) cpu_pause();
    end.stop();
    thread.join();
    EXPECT(!decode.is_closed());
    end.close();
    EXPECT(decode.is_closed());
  }
}

void what_does_not_fit_throws_with_file_and_line() {
  Memory memory;
  DecodeEnd decode(memory.data, kShape, 5);
  std::string message;
  try {
    decode.begin(plan_of({0, 1, 2, 3, 4, 5, 6, 7, 8}));
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  EXPECT(message.find("too many rows") != std::string::npos);
  EXPECT(message.find("decode_end.h:") != std::string::npos);
}

void plans_are_padded_with_rows_of_no_token() {
  Memory memory;
  DecodeEnd decode(memory.data, kShape, 5);
  End end(memory.data, 5, 2, true);
  std::memset(memory.data + kPage, 0x55, layout_of(kShape).q - kPage);
  decode.begin(plan_of({4, 9, 2}));
  EXPECT(end.next_plan() == Status::ready && end.take_plan());
  EXPECT(end.num_rows() == 3 && end.padded_rows() == 4 && end.padded_tokens() == 4);
  const Layout at = layout_of(kShape);
  const PlanCopy copy = end.copy();
  EXPECT(copy.query_start_loc[0] == 0 && copy.query_start_loc[3] == 3 && copy.query_start_loc[4] == 3);
  EXPECT(copy.seq_lens[3] == 0 && copy.block_table[3 * kShape.max_blocks] == 0 && copy.slot_mapping[3] == -1);
  std::memset(memory.data + kPage, 0x55, at.q - kPage);  // the decode worker's memory is its own to write
  EXPECT(copy.seq_lens[0] == 7 && copy.block_table[0] == 1 && copy.slot_mapping[0] == 3);
  EXPECT(bucket(1, 8) == 1 && bucket(5, 8) == 8 && bucket(5, 6) == 6 && bucket(6, 6) == 6);
}

void spinning_follows_what_was_seen() {
  Pace own(false), shared(true);
  EXPECT(shared.spin_ns() < 10'000);
  for (int i = 0; i < 100; ++i) {
    own.observe(100'000);
    shared.observe(100'000);
  }
  EXPECT(own.spin_ns() > 150'000 && own.spin_ns() < 300'000);
  EXPECT(shared.spin_ns() < 10'000);
  for (int i = 0; i < 100; ++i) own.observe(50'000'000);
  EXPECT(own.spin_ns() < 100'000);
}

}  // namespace

// `count`: how often what is left to chance is tried.
int main(int arguments, char** argument) {
  const int count = arguments > 1 ? std::atoi(argument[1]) : 300;
  many_steps_over_three_executors(count);
  an_executor_that_ends_costs_the_others_nothing(count / 5);
  a_stale_stamp_is_never_taken();
  layers_are_answered_once_each_and_in_order();
  an_end_that_sleeps_can_be_stopped_at_any_moment();
  what_does_not_fit_throws_with_file_and_line();
  plans_are_padded_with_rows_of_no_token();
  spinning_follows_what_was_seen();
  std::puts("ok");
}
