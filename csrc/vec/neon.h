// The value types of NEON on 64-bit Arm: four floats, two doubles.
#pragma once

#include <arm_neon.h>

#include "vec/pair.h"

namespace flatstep {

namespace neon {

struct F32 {
  float32x4_t x;
};

FLATSTEP_INLINE F32 operator+(F32 a, F32 b) { return {vaddq_f32(a.x, b.x)}; }
FLATSTEP_INLINE F32 operator-(F32 a, F32 b) { return {vsubq_f32(a.x, b.x)}; }
FLATSTEP_INLINE F32 operator*(F32 a, F32 b) { return {vmulq_f32(a.x, b.x)}; }
FLATSTEP_INLINE F32 operator/(F32 a, F32 b) { return {vdivq_f32(a.x, b.x)}; }
FLATSTEP_INLINE F32 root(F32 a) { return {vsqrtq_f32(a.x)}; }
FLATSTEP_INLINE F32 select(F32 side, F32 a, F32 b) {
  return {vbslq_f32(vceqzq_f32(side.x), b.x, a.x)};
}
FLATSTEP_INLINE F32 maximum(F32 a, F32 b) {
  const uint32x4_t nan = vmvnq_u32(vceqq_f32(a.x, a.x));
  return {vbslq_f32(vorrq_u32(vcgtq_f32(a.x, b.x), nan), a.x, b.x)};
}
FLATSTEP_INLINE F32 snap(F32 a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.x);
  return {vreinterpretq_f32_u32(vandq_u32(bits, vtstq_u32(bits, vdupq_n_u32(0x7f800000))))};
}

struct U32 {
  uint32x4_t x;
};

FLATSTEP_INLINE U32 operator+(U32 a, U32 b) { return {vaddq_u32(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator-(U32 a, U32 b) { return {vsubq_u32(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator*(U32 a, U32 b) { return {vmulq_u32(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator&(U32 a, U32 b) { return {vandq_u32(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator|(U32 a, U32 b) { return {vorrq_u32(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator^(U32 a, U32 b) { return {veorq_u32(a.x, b.x)}; }
template <int kBits>
FLATSTEP_INLINE U32 shift_left(U32 a) {
  return {vshlq_n_u32(a.x, kBits)};
}
template <int kBits>
FLATSTEP_INLINE U32 shift_right(U32 a) {
  return {vshrq_n_u32(a.x, kBits)};
}
template <int kBits>
FLATSTEP_INLINE U32 shift_right_signed(U32 a) {
  return {vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a.x), kBits))};
}
FLATSTEP_INLINE U32 equal(U32 a, U32 b) { return {vceqq_u32(a.x, b.x)}; }
FLATSTEP_INLINE U32 bits_of(F32 a) { return {vreinterpretq_u32_f32(a.x)}; }
FLATSTEP_INLINE F32 float_of(U32 a) { return {vreinterpretq_f32_u32(a.x)}; }
FLATSTEP_INLINE U32 where_nan(F32 a, U32 then, U32 otherwise) {
  return {vbslq_u32(vceqq_f32(a.x, a.x), otherwise.x, then.x)};
}

struct F64 {
  float64x2_t x;
};

FLATSTEP_INLINE F64 operator+(F64 a, F64 b) { return {vaddq_f64(a.x, b.x)}; }
FLATSTEP_INLINE F64 operator-(F64 a, F64 b) { return {vsubq_f64(a.x, b.x)}; }
FLATSTEP_INLINE F64 operator*(F64 a, F64 b) { return {vmulq_f64(a.x, b.x)}; }
FLATSTEP_INLINE F64 operator/(F64 a, F64 b) { return {vdivq_f64(a.x, b.x)}; }
FLATSTEP_INLINE F64 root(F64 a) { return {vsqrtq_f64(a.x)}; }
FLATSTEP_INLINE F64 select(F64 side, F64 a, F64 b) {
  return {vbslq_f64(vceqzq_f64(side.x), b.x, a.x)};
}
FLATSTEP_INLINE F64 maximum(F64 a, F64 b) {
  const uint64x2_t ordered = vceqq_f64(a.x, a.x);
  const float64x2_t larger = vbslq_f64(vcgtq_f64(a.x, b.x), a.x, b.x);
  return {vbslq_f64(ordered, larger, a.x)};
}
FLATSTEP_INLINE F64 snap(F64 a) {
  const uint64x2_t bits = vreinterpretq_u64_f64(a.x);
  const uint64x2_t normal = vtstq_u64(bits, vdupq_n_u64(0x7ff0000000000000));
  return {vreinterpretq_f64_u64(vandq_u64(bits, normal))};
}

// Rounds to bfloat16 in the upper half of each lane; the lower half is left over.
FLATSTEP_INLINE uint32x4_t round_to_high_half(F32 a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  return vbslq_u32(vceqq_f32(a.x, a.x), sum, vdupq_n_u32(kBFloat16NaN << 16));
}

}  // namespace neon

template <>
struct Lanes<neon::F32> {
  static constexpr int kCount = 4;
  FLATSTEP_INLINE static neon::F32 load(const float* from) { return {vld1q_f32(from)}; }
  FLATSTEP_INLINE static void load(const BFloat16* from, neon::F32& even, neon::F32& odd) {
    const uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(&from->bits));
    even.x = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
    odd.x = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(kHighHalf)));
  }
  FLATSTEP_INLINE static neon::F32 load(const Float16* from) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)))};
  }
  FLATSTEP_INLINE static void store(float* to, neon::F32 a) { vst1q_f32(to, a.x); }
  FLATSTEP_INLINE static void store(BFloat16* to, neon::F32 even, neon::F32 odd) {
    const uint32x4_t low = vshrq_n_u32(neon::round_to_high_half(even), 16);
    const uint32x4_t high = neon::round_to_high_half(odd);
    const uint32x4_t both = vbslq_u32(vdupq_n_u32(kHighHalf), high, low);
    vst1q_u16(&to->bits, vreinterpretq_u16_u32(both));
  }
  FLATSTEP_INLINE static void store(Float16* to, neon::F32 a) {
    const uint16x4_t rounded = vreinterpret_u16_f16(vcvt_f16_f32(a.x));
    const uint16x4_t ordered = vmovn_u32(vceqq_f32(a.x, a.x));
    vst1_u16(&to->bits, vbsl_u16(ordered, rounded, vdup_n_u16(kFloat16NaN)));
  }
  FLATSTEP_INLINE static neon::F32 all(float x) { return {vdupq_n_f32(x)}; }

  using Bits = neon::U32;
  FLATSTEP_INLINE static Bits load_halves(const std::uint16_t* from) {
    return {vmovl_u16(vld1_u16(from))};
  }
  FLATSTEP_INLINE static Bits load_offsets(const std::uint16_t* from) {
    return {vreinterpretq_u32_s32(vmovl_s16(vreinterpret_s16_u16(vld1_u16(from))))};
  }
  FLATSTEP_INLINE static void store_halves(std::uint16_t* to, Bits a) {
    vst1_u16(to, vmovn_u32(a.x));
  }
  FLATSTEP_INLINE static Bits load_bits(const void* from) {
    return {vreinterpretq_u32_u16(vld1q_u16(static_cast<const std::uint16_t*>(from)))};
  }
  FLATSTEP_INLINE static void store_bits(void* to, Bits a) {
    vst1q_u16(static_cast<std::uint16_t*>(to), vreinterpretq_u16_u32(a.x));
  }
  FLATSTEP_INLINE static Bits all_bits(std::uint32_t x) { return {vdupq_n_u32(x)}; }
  FLATSTEP_INLINE static Bits count_up() {
    constexpr std::uint32_t kLane[] = {0, 1, 2, 3};
    return {vld1q_u32(kLane)};
  }
};

template <>
struct Lanes<neon::F64> {
  static constexpr int kCount = 2;
  FLATSTEP_INLINE static neon::F64 load(const double* from) { return {vld1q_f64(from)}; }
  template <class Stored>
  FLATSTEP_INLINE static neon::F64 load(const Stored* from) {
    const float pair[] = {widen(from[0]), widen(from[1])};
    return {vcvt_f64_f32(vld1_f32(pair))};
  }
  FLATSTEP_INLINE static void store(double* to, neon::F64 a) { vst1q_f64(to, a.x); }
  FLATSTEP_INLINE static neon::F64 all(double x) { return {vdupq_n_f64(x)}; }
};

}  // namespace flatstep
