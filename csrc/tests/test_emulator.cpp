// The emulator: what it computes is what the PTX manual says, and it finds every fault that is planted here. Each fault
// stands beside the same kernel without it, which must pass. Built and run by tests/unit/test_cuda_emulator.py, plainly
// and with ASan and UBSan.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../cuda/elements.h"
#include "../cuda/emulation/primitives.h"

using namespace adrenaline::cuda;
using emulation::Machine;

namespace {

int failures = 0;

// Launch `kernel` in several orders. `wanted`: what must be complained of, or empty.
template <typename Kernel>
void expect(const char* name, const std::string& wanted, const Kernel& kernel, int blocks = 1, int threads = 64) {
  for (uint64_t seed = 0; seed < 5; ++seed) {
    const std::string said = Machine().run(blocks, threads, 4096, seed, kernel);
    if (wanted.empty() ? said.empty() : said.find(wanted) != std::string::npos) continue;
    std::fprintf(stderr, "%s: wanted \"%s\", found \"%s\"\n", name, wanted.c_str(), said.c_str());
    ++failures;
    return;
  }
}

void require(const char* name, bool holds) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", name);
  ++failures;
}

// Each thread writes a word and reads its neighbour's.
void neighbours(bool has_barrier, bool has_second) {
  const uint32_t mine = device::thread_index() * 4u, other = (device::thread_index() + 32) % 64 * 4u;
  for (int round = 0; round < 2; ++round) {
    device::shared_store(mine, device::thread_index() + round);
    if (has_barrier) device::barrier();
    if (device::shared_load<int>(other) != (device::thread_index() + 32) % 64 + round)
      device::emu::machine().complain("a neighbour's word is not the right one");
    if (has_second) device::barrier();
  }
}

void test_barriers() {
  expect("barriers", "", [] { neighbours(true, true); });
  // Where the threads run one after the other, the second is found to write what the first has read.
  expect("no barrier", "shared memory is read", [] { neighbours(false, false); });
  expect("no second barrier", "read and written by different threads with no barrier", [] { neighbours(true, false); });
  expect("two writers", "written by different threads", [] { device::shared_store(0, device::thread_index()); });
  expect("barriers at two places", "different barriers", [] {
    if (device::thread_index() < 32)
      device::barrier();
    else
      device::barrier();
  });
  expect("a barrier for some", "a barrier is not reached", [] {
    if (device::thread_index() < 32) device::barrier();
  });
  expect("a lane stays away", "do not all come", [] {
    if (device::thread_index() != 5) device::shuffle_xor(1.0f, 1);
  });
  expect("lanes at two collectives", "do not all come", [] {
    if (device::thread_index() % 2)
      device::shuffle_xor(1.0f, 1);
    else
      device::warp_barrier();
  });
  const auto within_warp = [](bool has_barrier) {
    device::shared_store(device::thread_index() * 4u, device::thread_index());
    if (has_barrier) device::warp_barrier();
    device::shared_load<int>((device::thread_index() ^ 1) * 4u);
  };
  expect("a warp's barrier", "", [&] { within_warp(true); });
  expect("no warp's barrier", "shared memory is read", [&] { within_warp(false); });
  expect("several readers", "read and written by different threads", [] {
    if (device::thread_index() == 0) device::shared_store(0, 1);
    device::barrier();
    if (device::thread_index() < 32) device::shared_load<int>(0);
    if (device::thread_index() == 31) device::shared_store(0, 2);
  });
}

void test_bounds() {
  expect("the last word", "", [] {
    if (device::thread_index() == 0) device::shared_store(4092, 1);
  });
  expect("a store beyond", "written out of bounds", [] { device::shared_store(4096, 1); });
  expect("a load beyond", "read out of bounds", [] { device::shared_load<int>(4096); });
  expect("half a word", "parts of a word", [] { device::shared_store(2, uint16_t{1}); });
  expect("not aligned", "not aligned", [] { device::shared_load<int>(2); });
  expect("a pair that is not aligned", "not aligned", [] { device::shared_store(4, uint64_t{1}); });
  expect("nobody wrote", "nobody wrote", [] { device::shared_load<int>(0); });
}

void test_copies() {
  alignas(16) static const int source[4] = {1, 2, 3, 4};
  const auto copy = [](int commits, int pending, bool has_barrier, int reader) {
    if (device::thread_index() == 0) device::copy_async(0, source, true);
    for (int i = 0; i < commits; ++i) device::copy_commit();
    device::copy_wait(pending);
    if (has_barrier) device::barrier();
    if (device::thread_index() == reader && device::shared_load<int>(8) != 3)
      device::emu::machine().complain("the copy is wrong");
  };
  const char* early = "before the asynchronous copy into it was waited for";
  expect("a copy", "", [&] { copy(1, 0, true, 40); });
  expect("own copy without a barrier", "", [&] { copy(1, 0, false, 0); });
  expect("an older group", "", [&] { copy(2, 1, true, 40); });
  expect("a group too early", early, [&] { copy(1, 1, true, 40); });
  expect("not committed", early, [&] { copy(0, 0, true, 40); });
  expect("no barrier after the wait", "shared memory is read", [&] { copy(1, 0, false, 40); });
  expect("a stage loaded while it is read", "read and written by different threads", [] {
    device::shared_store(device::thread_index() * 4u, 1);
    device::barrier();
    device::shared_load<int>((device::thread_index() ^ 32) * 4u);
    if (device::thread_index() % 4 == 0) device::copy_async(device::thread_index() * 4u, source, true);
  });
  expect("two copies to one place", "while an asynchronous copy", [] {
    if (device::thread_index() == 0) device::copy_async(0, source, true);
    if (device::thread_index() == 0) device::copy_async(0, source, true);
  });
  expect("zeros", "", [] {
    if (device::thread_index() > 0) return;
    device::copy_async(0, source, false);
    device::copy_commit();
    device::copy_wait(0);
    if (device::shared_load<int>(8) != 0) device::emu::machine().complain("not zero");
  });
}

// Every block stores a number; the last one adds them up.
struct Sum {
  struct Two {
    float first, second;
  };
  Two parts[8];
  uint32_t counter = 0, total = 0;

  void run(bool release, bool acquire, bool has_barrier) {
    const int block = device::block_index();
    if (device::thread_index() == 33) device::store_for_blocks(&parts[block], Two{1.0f + block, 0.0f});
    if (has_barrier) device::barrier();
    if (device::thread_index() == 0) {
      if (release) device::fence();
      const uint32_t before = device::atomic_increment(&counter);
      if (acquire) device::fence();
      device::shared_store(0, before);
    }
    device::barrier();
    if (device::shared_load<uint32_t>(0) + 1 != 8 || device::thread_index() != 40) return;
    for (const Two& part : parts) total += static_cast<uint32_t>(device::load_from_blocks(&part).first);
  }
};

void test_blocks() {
  const auto sum = [](const char* name, const char* wanted, bool release, bool acquire, bool has_barrier) {
    for (uint64_t seed = 0; seed < 5; ++seed) {
      Sum all;
      const std::string said = Machine().run(8, 64, 4096, seed, [&] { all.run(release, acquire, has_barrier); });
      const bool right = *wanted ? said.find(wanted) != std::string::npos : said.empty() && all.total == 36;
      if (!right) std::fprintf(stderr, "%s: found \"%s\"\n", name, said.c_str());
      failures += !right;
    }
  };
  sum("fences", "", true, true, true);
  sum("no fences", "has made no fence", false, false, true);
  sum("no release", "has made no fence", false, true, true);
  sum("no acquire", "no fence after the atomic", true, false, true);
  // The fence of one thread does not release what another one of its block may not have stored yet.
  sum("no barrier before the fence", "has made no fence", true, true, false);

  static int words[64];
  expect("each its own", "", [] { device::store(&words[device::thread_index()], 1); });
  expect("written twice", "written twice", [] { device::store(&words[device::thread_index() / 2], 1); });
  alignas(16) static int line[4];
  const auto meets = [](int writer, int reader) {
    if (device::block_index() == writer && device::thread_index() == 0) device::store(&line[1], 1);
    if (device::block_index() == reader && device::thread_index() == 0) device::copy_async(0, line, true);
    device::copy_commit();
    device::copy_wait(0);
    device::barrier();
  };
  expect("read where it is written", "in the same launch", [&] { meets(0, 1); }, 2);
}

float number(std::mt19937& random) { return static_cast<float>(static_cast<int>(random() % 33) - 16) / 8; }

// m16n8k16 as the PTX manual has it: of a, register i holds row g + 8 (i % 2), column 2t + 8 (i / 2); of b, register i
// row 2t + 8 i, column g; of c, register i row g + 8 (i / 2), column 2t + i % 2.
void test_product() {
  std::mt19937 random(3);
  float a[16][16], b[16][8], c[16][8];
  for (auto& row : a)
    for (float& x : row) x = number(random);
  for (auto& row : b)
    for (float& x : row) x = number(random);
  for (auto& row : c)
    for (float& x : row) x = number(random);
  for (bool is_half : {false, true}) {
    int wrong = 0;
    expect("a product", "", [&] {
      const int lane = device::thread_index() % 32, g = lane / 4, t = lane % 4;
      const auto pack = [&](float x, float y) { return is_half ? device::pack_half(x, y) : device::pack_bf16(x, y); };
      uint32_t ra[4], rb[2];
      float rc[4];
      for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i % 2), column = 2 * t + 8 * (i / 2);
        ra[i] = pack(a[row][column], a[row][column + 1]);
        rc[i] = c[g + 8 * (i / 2)][2 * t + i % 2];
      }
      for (int i = 0; i < 2; ++i) rb[i] = pack(b[2 * t + 8 * i][g], b[2 * t + 8 * i + 1][g]);
      is_half ? device::multiply_half(rc, ra, rb) : device::multiply_bf16(rc, ra, rb);
      for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        float sum = c[row][column];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        wrong += rc[i] != sum;  // numbers are such that every sum is exact
      }
    });
    require("a product is wrong", wrong == 0);
  }
}

void test_matrices() {
  for (bool transposed : {false, true}) {
    int wrong = 0;
    expect("matrices", "", [&] {
      const int lane = device::thread_index();
      // Matrix m, row r, column c is 64 m + 8 r + c; row r of matrix m lies where lane 8 m + r says.
      const uint32_t at = (31 - lane) * 16u;
      for (int pair = 0; pair < 4; ++pair)
        device::shared_store(at + 4 * pair, (lane * 8 + 2 * pair) | (lane * 8 + 2 * pair + 1) << 16);
      device::warp_barrier();
      uint32_t found[4];
      transposed ? device::load_matrices_transposed(found, at) : device::load_matrices(found, at);
      for (int m = 0; m < 4; ++m) {
        const int row = lane / 4, column = 2 * (lane % 4);
        const int first = transposed ? 64 * m + 8 * column + row : 64 * m + 8 * row + column;
        const int second = transposed ? first + 8 : first + 1;
        wrong += found[m] != static_cast<uint32_t>(first | second << 16);
      }
    }, 1, 32);
    require("matrices are wrong", wrong == 0);
  }
}

void test_numbers() {
  bool half = true, bf16 = true, fp8 = true;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = device::widen_half(bits), y = device::widen_bf16(bits);
    half = half && (std::isnan(x) || device::narrow_half(x) == bits);
    bf16 = bf16 && (std::isnan(y) || device::narrow_bf16(y) == bits);
  }
  // Halfway between two numbers the even one is nearest, and a little more or less decides.
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const float low = device::widen_half(bits), high = device::widen_half(bits + 1), middle = (low + high) / 2;
    half = half && device::narrow_half(middle) == bits + bits % 2;
    half = half && device::narrow_half(std::nextafter(middle, low)) == bits;
    half = half && device::narrow_half(std::nextafter(middle, high)) == bits + 1;
  }
  const auto of_fp8 = [](uint32_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    return bits & 0x80 ? -size : size;
  };
  for (uint32_t bits = 0; bits < 256; ++bits) {
    const uint32_t two = bits | (bits ^ 0x80) << 16;
    if ((bits & 0x7f) == 0x7f) continue;
    fp8 = fp8 && to_fp8(of_fp8(bits)) == bits;
    for (int high = 0; high < 2; ++high) {
      const float wanted = of_fp8(two >> 16 * high & 0xff);
      fp8 = fp8 && device::widen_half(Math<Half>::from_fp8(two) >> 16 * high & 0xffff) == wanted;
      fp8 = fp8 && device::widen_bf16(Math<Bf16>::from_fp8(two) >> 16 * high & 0xffff) == wanted;
    }
    if ((bits & 0x7f) == 0x7e || bits >= 0x80) continue;
    const float low = of_fp8(bits), high = of_fp8(bits + 1), middle = (low + high) / 2;
    fp8 = fp8 && to_fp8(middle) == bits + bits % 2 && to_fp8(-middle) == (bits + bits % 2 + 0x80);
    fp8 = fp8 && to_fp8(std::nextafter(middle, low)) == bits && to_fp8(std::nextafter(middle, high)) == bits + 1;
  }
  fp8 = fp8 && to_fp8(1e9f) == 0x7e && to_fp8(-INFINITY) == 0xfe && (to_fp8(NAN) & 0x7f) == 0x7f;
  require("half is wrong", half);
  require("bf16 is wrong", bf16);
  require("fp8 is wrong", fp8);
}

void test_shuffle() {
  int wrong = 0;
  expect("a shuffle", "", [&] {
    const int lane = device::thread_index();
    wrong += device::shuffle_xor(static_cast<float>(lane), 2) != static_cast<float>(lane ^ 2);
  });
  require("a shuffle is wrong", wrong == 0);
}

}  // namespace

int main() {
  test_barriers();
  test_bounds();
  test_copies();
  test_blocks();
  test_product();
  test_matrices();
  test_numbers();
  test_shuffle();
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}
