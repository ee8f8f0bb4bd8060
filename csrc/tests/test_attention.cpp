// Decode attention against attention written out in double precision, over shapes and lengths. Built and run by
// tests/unit/test_native.py, plainly and with ASan and UBSan: the caches are as large as they must be, so that reading
// beyond them is seen. That every bit is vLLM's is tested from Python.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../attention/decode.h"

using namespace adrenaline::attention;

namespace {

float to_float(float x) { return x; }
float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
void from_float(float x, float* to) { *to = x; }
void from_float(float x, Bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->bits = static_cast<uint16_t>(bits >> 16);
}

template <typename T>
void check(int heads, int kv_heads, int size, int block, const std::vector<int32_t>& lengths, double tolerance) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const int64_t rows = static_cast<int64_t>(lengths.size());
  int width = 1, blocks = 0;
  for (int length : lengths) {
    const int used = (length + block - 1) / block;
    width = used > width ? used : width;
    blocks += used;
  }
  const int64_t head_stride = static_cast<int64_t>(block) * size, block_stride = kv_heads * head_stride;
  std::vector<T> keys(blocks * block_stride), values(keys.size()), query(rows * heads * size), out(query.size());
  for (auto* all : {&keys, &values, &query})
    for (T& x : *all) from_float(normal(random), &x);
  std::vector<int32_t> table(rows * width), starts(rows + 1);
  for (int64_t row = 0, next = blocks; row < rows; ++row) {
    starts[row + 1] = static_cast<int32_t>(row + 1);
    for (int i = 0; i < (lengths[row] + block - 1) / block; ++i) table[row * width + i] = static_cast<int32_t>(--next);
  }
  const float scale = 1 / std::sqrt(static_cast<float>(size));
  const Call<T> call{query.data(), keys.data(), values.data(), out.data(), table.data(), lengths.data(), starts.data(),
                     rows, width, heads * size, heads * size, block_stride, head_stride, heads, kv_heads, size, block,
                     scale};
  std::vector<float> scratch(scratch_of(call));
  attend(call, scratch.data());

  std::vector<double> weights, wanted(size);
  for (int64_t row = 0; row < rows; ++row)
    for (int head = 0; head < heads && lengths[row] > 0; ++head) {
      const T* q = &query[(row * heads + head) * size];
      const auto offset = [&](int t) {
        return table[row * width + t / block] * block_stride + head / (heads / kv_heads) * head_stride;
      };
      weights.assign(lengths[row], 0);
      double sum = 0;
      for (int t = 0; t < lengths[row]; ++t) {
        double logit = 0;
        for (int d = 0; d < size; ++d)
          logit += static_cast<double>(to_float(q[d])) * to_float(keys[offset(t) + d * block + t % block]);
        sum += weights[t] = std::exp(logit * scale);
      }
      wanted.assign(size, 0);
      for (int t = 0; t < lengths[row]; ++t)
        for (int d = 0; d < size; ++d)
          wanted[d] += weights[t] / sum * to_float(values[offset(t) + t % block * size + d]);
      for (int d = 0; d < size; ++d) {
        const double found = to_float(out[(row * heads + head) * size + d]);
        if (!(std::fabs(found - wanted[d]) <= tolerance * (1 + std::fabs(wanted[d])))) {
          std::fprintf(stderr, "%d/%d heads, %d, block %d, row of %d: %g is not %g\n", heads, kv_heads, size, block,
                       lengths[row], found, wanted[d]);
          std::exit(1);
        }
      }
    }
}

}  // namespace

int main() {
  const std::vector<int32_t> lengths{1, 31, 0, 32, 33, 100, 128, 129, 300};
  const int shapes[][4] = {{8, 8, 64, 128}, {8, 2, 64, 128}, {8, 4, 32, 32}, {8, 1, 128, 64}, {2, 2, 96, 32}};
  if (supported())
    for (const auto& s : shapes) {
      check<float>(s[0], s[1], s[2], s[3], lengths, 1e-4);
      check<Bf16>(s[0], s[1], s[2], s[3], lengths, 1e-2);
    }
  std::printf("ok\n");
}
