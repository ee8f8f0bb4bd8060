// Round trips per layer between two processes, without attention and without Python: the floor, and the channel.
//
//   bench_channel ROWS COUNT CORE_A CORE_B   prints nanoseconds, one line a round trip: floor, then channel
//
// The floor: a flag there and back, and the bytes of q, k, v and of the output copied once each by memcpy.
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "../shm/decode_end.h"
#include "../shm/executor_end.h"

using namespace adrenaline::shm;
using adrenaline::kMaxLayers;

namespace {

// 32 query heads, 8 KV heads, head size 128, bfloat16.
constexpr uint64_t kQ = 32 * 128 * 2, kKv = 8 * 128 * 2;

void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  ADRENALINE_CHECK(sched_setaffinity(0, sizeof set, &set) == 0, "no such core");
}

char* share(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ADRENALINE_CHECK(memory != MAP_FAILED, "mmap");
  std::memset(memory, 0, bytes);
  return static_cast<char*>(memory);
}

template <typename Body>
pid_t in_child(int core, Body&& body) {
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    pin(core);
    body();
    _exit(0);
  }
  return pid;
}

void end(pid_t pid) {
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
}

void report(const char* name, const std::vector<int64_t>& times) {
  for (int64_t time : times) std::printf("%s %lld\n", name, static_cast<long long>(time));
}

void bench_floor(uint64_t rows, size_t count, int core_b) {
  const size_t in = rows * (kQ + 2 * kKv), out = rows * kQ;
  auto* memory = share(kPage + in + out);
  auto& there = *reinterpret_cast<std::atomic<uint64_t>*>(memory);
  auto& back = *reinterpret_cast<std::atomic<uint64_t>*>(memory + kLine);
  const pid_t pid = in_child(core_b, [&] {
    for (uint64_t i = 1;; ++i) {
      while (there.load(std::memory_order_acquire) != i) cpu_pause();
      back.store(i, std::memory_order_release);
    }
  });
  std::vector<char> from(in, 1), to(out);
  std::vector<int64_t> times;
  for (uint64_t i = 1; i <= count; ++i) {
    const int64_t begin = now_ns();
    std::memcpy(memory + kPage, from.data(), in);
    there.store(i, std::memory_order_release);
    while (back.load(std::memory_order_acquire) != i) cpu_pause();
    std::memcpy(to.data(), memory + kPage + in, out);
    times.push_back(now_ns() - begin);
  }
  end(pid);
  report("floor", times);
}

void bench_channel(uint64_t rows, size_t count, int core_b) {
  const Shape shape{rows, rows, 1, kQ, kKv, kQ};
  auto* memory = share(layout_of(shape).total);
  DecodeEnd decode(memory, shape, 1);
  decode.watch({}, false);
  std::vector<int32_t> starts(shape.max_rows + 1), lens(shape.max_rows), table(shape.max_rows * shape.max_blocks);
  std::vector<int64_t> slots(shape.max_tokens);
  const PlanCopy copy{starts.data(), lens.data(), table.data(), slots.data()};
  ExecutorEnd executor(memory, shape, 1, {adrenaline::kMaxLayers, kForever / 2, false}, copy);
  const pid_t pid = in_child(core_b, [&] {
    for (;;) {
      executor.next_plan();
      if (!executor.take_plan()) return;
      while (executor.next_layer([](auto&& wait) { wait(); }) == Status::ready) {
      }
    }
  });
  adrenaline::plan::RowsPlan plan;
  for (uint64_t row = 0; row < rows; ++row) {
    plan.rows.push_back(static_cast<int32_t>(row));
    plan.query_start_loc.push_back(static_cast<int32_t>(row + 1));
    plan.seq_lens.push_back(1);
    plan.block_table.push_back(0);
    plan.slot_mapping.push_back(0);
    plan.tokens.push_back(static_cast<int64_t>(row));
  }
  const int64_t stride = kQ + 2 * kKv;
  std::vector<char> from(rows * stride, 1), to(rows * kQ);
  std::vector<int64_t> times;
  StepEnds steps;
  for (uint64_t layer = adrenaline::kMaxLayers; times.size() < count; ++layer) {
    if (layer == adrenaline::kMaxLayers) {
      steps.begin(10'000'000'000, 10'000'000'000);
      steps.add(0, &decode, plan, kQ);
      layer = 0;
    }
    const int64_t begin = now_ns();
    steps.send(layer, {from.data(), stride}, {from.data() + kQ, stride}, {from.data() + kQ + kKv, stride});
    const uint64_t failed = steps.receive(layer, {to.data(), static_cast<int64_t>(kQ)}, [](auto&& sleep) { sleep(); });
    times.push_back(now_ns() - begin);
    ADRENALINE_CHECK(failed == 0, "the executor did not answer");
  }
  end(pid);
  report("channel", times);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: bench_channel ROWS COUNT CORE_A CORE_B\n");
    return 2;
  }
  const uint64_t rows = std::strtoull(argv[1], nullptr, 10);
  const size_t count = std::strtoull(argv[2], nullptr, 10);
  pin(std::atoi(argv[3]));
  bench_floor(rows, count, std::atoi(argv[4]));
  bench_channel(rows, count, std::atoi(argv[4]));
}
