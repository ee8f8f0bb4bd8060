// The numbers of a KV cache and of a message, and how fp8 becomes what tensor cores of every architecture multiply.
#pragma once

#include <cstdint>

#include "primitives.h"

namespace adrenaline::cuda {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct Fp8 {  // e4m3 without infinities
  uint8_t bits;
};

template <typename T>
struct Math;

// Of each: how two floats are packed, how products are made, how one number is widened. `from_fp8` turns two fp8 numbers,
// in bits 0-7 and 16-23 of a word, into two numbers. Their bits are moved to where the wider format has sign, exponent and
// mantissa; a multiplication makes up for the other bias of the exponent. That is exact, subnormals included. Only the NaN
// of fp8 reads as 480: it takes a NaN that was appended to have one in the cache.
template <>
struct Math<Bf16> {
  static ADRENALINE_DEVICE uint32_t pack(float low, float high) { return device::pack_bf16(low, high); }
  static ADRENALINE_DEVICE float widen(uint32_t bits) { return device::widen_bf16(bits); }
  static ADRENALINE_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    device::multiply_bf16(c, a, b);
  }
  static ADRENALINE_DEVICE uint32_t from_fp8(uint32_t two) {
    const uint32_t moved = (two & 0x00800080) << 8 | (two & 0x007f007f) << 4;
    return device::scale_bf16(moved, 0x7b807b80);  // 2^120
  }
};

template <>
struct Math<Half> {
  static ADRENALINE_DEVICE uint32_t pack(float low, float high) { return device::pack_half(low, high); }
  static ADRENALINE_DEVICE float widen(uint32_t bits) { return device::widen_half(bits); }
  static ADRENALINE_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    device::multiply_half(c, a, b);
  }
  static ADRENALINE_DEVICE uint32_t from_fp8(uint32_t two) {
    const uint32_t moved = (two & 0x00800080) << 8 | (two & 0x007f007f) << 7;
    return device::scale_half(moved, 0x5c005c00);  // 2^8
  }
};

// The fp8 number nearest to x, even ones first; what is too large becomes the largest, 448.
ADRENALINE_DEVICE uint32_t to_fp8(float x) {
  const uint32_t bits = device::bits_of(x), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return sign | 0x7f;
  if (size > 0x43e00000) return sign | 0x7e;
  if (size < 0x3c800000)  // less than 2^-6: a multiple of 2^-9, which is the step of floats from 2^14 on
    return sign | (device::bits_of(device::float_of(size) + 16384.0f) - device::bits_of(16384.0f));
  return sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3));
}

}  // namespace adrenaline::cuda
