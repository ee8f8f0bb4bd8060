// Decode attention (one query token a row) over vLLM's paged KV cache on one core with AVX-512: the arithmetic of vLLM's
// own operator, bit for bit (csrc/cpu/cpu_attn_impl.hpp and cpu_attn_vec.hpp of vLLM 0.32, ISA "vec"), at the speed of
// memory. vLLM reads keys 64 bytes at a stride of a block and leaves the misses to the hardware; here each block of a head
// is read in the order it lies in memory, while the next one is prefetched. Every sum has vLLM's order:
// - a logit is a chain of fused multiply-adds over the head's dimensions, in fp32;
// - maximum and exponential are taken over all tokens of a row, rounded up to 32, as one tile;
// - an output is a chain of fused multiply-adds over tokens, scaled by the inverse of the sum at the end.
// tests/unit/test_native_decode.py holds it to that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace adrenaline::attention {

// What one call attends. Strides in elements; keys [block, head, D, B], values [block, head, B, D], of one layer.
template <typename T>
struct Call {
  const T *query, *keys, *values;
  T* out;
  const int32_t *block_table, *seq_lens, *query_start_loc;
  int64_t rows, table_stride, query_stride, out_stride, block_stride, head_stride;
  int heads, kv_heads, head_size, block_size;
  float scale;
};

struct Bf16 {
  uint16_t bits;
};

constexpr int kLanes = 16;
constexpr int kGroup = 32;  // vLLM computes tokens, and dimensions of values, in groups of this size

// How many query heads may share a KV head. They are computed together, so each number is compiled for itself.
template <int... G>
struct Sizes {
  static constexpr bool have(int size) { return ((size == G) || ...); }
};
using GroupSizes = Sizes<1, 2, 4, 8>;

constexpr bool has_group(int heads, int kv_heads) {
  return kv_heads > 0 && heads % kv_heads == 0 && GroupSizes::have(heads / kv_heads);
}

// Floats that a call needs to work in.
template <typename T>
size_t scratch_of(const Call<T>& c) {
  int longest = 0;
  for (int64_t row = 0; row < c.rows; ++row) longest = c.seq_lens[row] > longest ? c.seq_lens[row] : longest;
  return (c.heads / c.kv_heads) * (2 * c.head_size + static_cast<size_t>(longest) + kGroup);
}

}  // namespace adrenaline::attention

#if defined(__x86_64__)

// GCC 12 takes its own _mm512_undefined_ps() for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace adrenaline::attention {

#define ADRENALINE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define ADRENALINE_INLINE ADRENALINE_AVX512 inline __attribute__((always_inline))

inline bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
}

ADRENALINE_INLINE __m512 load(const float* p) { return _mm512_loadu_ps(p); }
ADRENALINE_INLINE __m512 load(const Bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// 32 neighbours as two vectors in whichever order is cheapest to make, for each lane is a sum of its own; `put` has the
// two back in order. Of bfloat16 these are the even and the odd ones: one mask and one shift for 64 bytes.
struct Pair {
  __m512 a, b;
};
ADRENALINE_INLINE Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
ADRENALINE_INLINE Pair load_pair(const Bf16* p) {
  const __m512i both = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)))};
}
template <typename T>
ADRENALINE_INLINE Pair get(const float* p) {
  const Pair in{load(p), load(p + kLanes)};
  if (sizeof(T) == sizeof(float)) return in;
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return {_mm512_permutex2var_ps(in.a, even, in.b), _mm512_permutex2var_ps(in.a, odd, in.b)};
}
template <typename T>
ADRENALINE_INLINE void put(float* p, Pair x) {
  if (sizeof(T) != sizeof(float)) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    x = {_mm512_permutex2var_ps(x.a, low, x.b), _mm512_permutex2var_ps(x.a, high, x.b)};
  }
  _mm512_storeu_ps(p, x.a);
  _mm512_storeu_ps(p + kLanes, x.b);
}

ADRENALINE_INLINE void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
ADRENALINE_INLINE void store(Bf16* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}

// e^x as vLLM computes it: a polynomial of degree 5 around the nearest power of two.
ADRENALINE_INLINE __m512 exponential(__m512 x) {
  const __m512 lowest = _mm512_castsi512_ps(_mm512_set1_epi32(0xc2aeac50));
  const __m512 one = _mm512_set1_ps(1.0f);
  const __mmask16 is_zero = _mm512_cmp_ps_mask(x, lowest, _CMP_LT_OS);
  const __m512 from = _mm512_max_ps(_mm512_min_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0x42b17218))), lowest);
  const __m512 log2e = _mm512_castsi512_ps(_mm512_set1_epi32(0x3fb8aa3b));
  const __m512i n = _mm512_cvt_roundps_epi32(_mm512_fmadd_ps(from, log2e, _mm512_set1_ps(0.5f)),
                                             _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512 power = _mm512_cvtepi32_ps(n);
  const __m512 rest = _mm512_fnmadd_ps(power, _mm512_castsi512_ps(_mm512_set1_epi32(0x3f317218)), from);
  __m512 y = _mm512_fmadd_ps(rest, _mm512_set1_ps(0.00828929059f), _mm512_set1_ps(0.0418978221f));
  y = _mm512_fmadd_ps(rest, y, _mm512_set1_ps(0.166676521f));
  y = _mm512_fmadd_ps(rest, y, _mm512_set1_ps(0.499991506f));
  y = _mm512_fmadd_ps(rest, y, _mm512_set1_ps(0.999999701f));
  y = _mm512_fmadd_ps(rest, y, one);
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_sub_ps(power, one)), _mm512_set1_epi32(127));
  const __m512 half_scale =
      _mm512_mask_blend_ps(is_zero, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)), _mm512_setzero_ps());
  return _mm512_mul_ps(_mm512_mul_ps(y, half_scale), _mm512_set1_ps(2.0f));
}

ADRENALINE_INLINE void add(Pair& sum, __m512 factor, const Pair& x) {
  sum.a = _mm512_fmadd_ps(factor, x.a, sum.a);
  sum.b = _mm512_fmadd_ps(factor, x.b, sum.b);
}

// Reads ahead: one line of what is needed next for every line of what is read now.
struct Ahead {
  const char* next;

  ADRENALINE_INLINE void lines(int bytes) {
    for (int i = 0; i < bytes; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
    next += bytes;
  }
};

// A product of matrices; strides in elements. It is `out` [G, columns] = or, with kAdd, += a [G, depth] x b [depth, columns].
template <typename T>
struct Product {
  const float* a;
  int64_t a_stride;
  const T* b;
  int64_t b_stride;
  int depth;
  float* out;
  int64_t out_stride;
};

// 32 P columns of it, from `column` on: a chain of multiply-adds over the depth for each of them.
template <typename T, int G, int P, bool kAdd>
ADRENALINE_INLINE void columns_of(const Product<T>& m, int column, Ahead& ahead) {
  const T* b = m.b + column;
  float* out = m.out + column;
  Pair sums[G][P];
  for (int g = 0; g < G; ++g)
    for (int p = 0; p < P; ++p)
      sums[g][p] = kAdd ? get<T>(out + g * m.out_stride + p * kGroup) : Pair{_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int d = 0; d < m.depth; ++d, b += m.b_stride) {
    ahead.lines(P * kGroup * sizeof(T));
    for (int p = 0; p < P; ++p) {
      const Pair x = load_pair(b + p * kGroup);
      for (int g = 0; g < G; ++g) add(sums[g][p], _mm512_set1_ps(m.a[g * m.a_stride + d]), x);
    }
  }
  for (int g = 0; g < G; ++g)
    for (int p = 0; p < P; ++p) put<T>(out + g * m.out_stride + p * kGroup, sums[g][p]);
}

template <typename T, int G, int P, bool kAdd>
ADRENALINE_INLINE void multiply(const Product<T>& m, int columns, Ahead ahead) {
  int column = 0;
  for (; column + P * kGroup <= columns; column += P * kGroup) columns_of<T, G, P, kAdd>(m, column, ahead);
  for (; column < columns; column += kGroup) columns_of<T, G, 1, kAdd>(m, column, ahead);
}

// Turn logits of `length` tokens (padded to kGroup) into weights; return their sum.
ADRENALINE_INLINE float softmax(float* logits, int length, int padded) {
  for (int t = length; t < padded; ++t) logits[t] = -std::numeric_limits<float>::infinity();
  __m512 greatest = _mm512_set1_ps(std::numeric_limits<float>::lowest());
  for (int t = 0; t < padded; t += kLanes) greatest = _mm512_max_ps(_mm512_loadu_ps(logits + t), greatest);
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(greatest));
  __m512 sum = _mm512_setzero_ps();
  for (int t = 0; t < padded; t += kLanes) {
    const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(logits + t), top));
    _mm512_storeu_ps(logits + t, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  return _mm512_reduce_add_ps(sum);
}

// One row and KV head, with the G query heads that share it. `after`: what will be read next, or null.
template <typename T, int G>
ADRENALINE_AVX512 void attend_head(const Call<T>& c, int64_t row, int kv_head, const T* after, float* scratch) {
  constexpr int kKeys = G <= 2 ? 4 : G == 4 ? 2 : 1, kValues = G <= 4 ? 2 : 1;  // pairs at once: registers are 32
  const int size = c.head_size, block = c.block_size, length = c.seq_lens[row];
  const int padded = (length + kGroup - 1) / kGroup * kGroup, blocks = (length + block - 1) / block;
  const int32_t* table = c.block_table + row * c.table_stride;
  const int64_t token = c.query_start_loc[row];
  float* q = scratch;
  float* outputs = q + G * size;
  float* logits = outputs + G * size;
  const auto at = [&](const T* base, int i) { return base + table[i] * c.block_stride + kv_head * c.head_stride; };

  const T* query = c.query + token * c.query_stride + kv_head * G * size;
  for (int i = 0; i < G * size; i += kLanes)
    _mm512_storeu_ps(q + i, _mm512_mul_ps(load(query + i), _mm512_set1_ps(c.scale)));
  std::memset(outputs, 0, sizeof(float) * G * size);

  const auto tokens_in = [&](int i) { return padded - i * block < block ? padded - i * block : block; };
  for (int i = 0; i < blocks; ++i) {
    const T* next = i + 1 < blocks ? at(c.keys, i + 1) : at(c.values, 0);
    multiply<T, G, kKeys, false>({q, size, at(c.keys, i), block, size, logits + i * block, padded}, tokens_in(i),
                                 {reinterpret_cast<const char*>(next)});
  }
  float sums[G];
  for (int g = 0; g < G; ++g) sums[g] = softmax(logits + g * padded, length, padded);
  for (int i = 0; i < blocks; ++i) {
    const T* values = at(c.values, i);
    const T* next = i + 1 < blocks ? at(c.values, i + 1) : after != nullptr ? after : values;
    multiply<T, G, kValues, true>({logits + i * block, padded, values, size, tokens_in(i), outputs, size}, size,
                                  {reinterpret_cast<const char*>(next)});
  }
  T* out = c.out + token * c.out_stride + kv_head * G * size;
  for (int g = 0; g < G; ++g) {
    const __m512 inverse = _mm512_set1_ps(static_cast<float>(1.0 / sums[g]));
    for (int i = 0; i < size; i += kLanes)
      store(out + g * size + i, _mm512_mul_ps(inverse, _mm512_loadu_ps(outputs + g * size + i)));
  }
}

template <typename T, int G>
void attend_rows(const Call<T>& c, float* scratch) {
  const auto is_empty = [&](int64_t row) {
    return c.query_start_loc[row + 1] == c.query_start_loc[row] || c.seq_lens[row] == 0;
  };
  for (int64_t row = 0; row < c.rows; ++row) {
    if (is_empty(row)) continue;
    int64_t later = row + 1;
    while (later < c.rows && is_empty(later)) ++later;
    const T* first = c.keys + c.block_table[row * c.table_stride] * c.block_stride;
    const T* then = later < c.rows ? c.keys + c.block_table[later * c.table_stride] * c.block_stride : nullptr;
    for (int head = 0; head < c.kv_heads; ++head)
      attend_head<T, G>(c, row, head, head + 1 < c.kv_heads ? first + (head + 1) * c.head_stride : then, scratch);
  }
}

template <typename T, int... G>
void attend_in(Sizes<G...>, const Call<T>& c, float* scratch) {
  ((c.heads / c.kv_heads == G ? attend_rows<T, G>(c, scratch) : void()), ...);
}

// Attend all rows that have a token and a length; `scratch` of scratch_of(c) floats.
template <typename T>
void attend(const Call<T>& c, float* scratch) {
  attend_in(GroupSizes{}, c, scratch);
}

}  // namespace adrenaline::attention

#else

namespace adrenaline::attention {

constexpr bool supported() { return false; }
template <typename T>
void attend(const Call<T>&, float*) {}  // never called where it is not supported

}  // namespace adrenaline::attention

#endif
