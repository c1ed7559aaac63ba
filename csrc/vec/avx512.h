// The value types of AVX-512 (F, BW, DQ, VL): sixteen floats, eight doubles.
//
// AVX512-BF16 is not used: its narrowing flushes subnormals.
#pragma once

#include <immintrin.h>

#include "vec/pair.h"

namespace flatstep {

namespace avx512 {

struct F32 {
  __m512 x;
};

FLATSTEP_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.x, b.x)}; }
FLATSTEP_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.x, b.x)}; }
FLATSTEP_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.x, b.x)}; }
FLATSTEP_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.x, b.x)}; }
FLATSTEP_INLINE F32 root(F32 a) { return {_mm512_sqrt_ps(a.x)}; }
FLATSTEP_INLINE F32 select(F32 side, F32 a, F32 b) {
  const __mmask16 set = _mm512_cmp_ps_mask(side.x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return {_mm512_mask_blend_ps(set, b.x, a.x)};
}
FLATSTEP_INLINE F32 maximum(F32 a, F32 b) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  return {_mm512_mask_blend_ps(nan, _mm512_max_ps(a.x, b.x), a.x)};
}
FLATSTEP_INLINE F32 snap(F32 a) {
  const __m512i bits = _mm512_castps_si512(a.x);
  return {_mm512_maskz_mov_ps(_mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7f800000)), a.x)};
}

struct U32 {
  __m512i x;
};

FLATSTEP_INLINE U32 operator+(U32 a, U32 b) { return {_mm512_add_epi32(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator-(U32 a, U32 b) { return {_mm512_sub_epi32(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator*(U32 a, U32 b) { return {_mm512_mullo_epi32(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator&(U32 a, U32 b) { return {_mm512_and_si512(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator|(U32 a, U32 b) { return {_mm512_or_si512(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator^(U32 a, U32 b) { return {_mm512_xor_si512(a.x, b.x)}; }
template <int kBits>
FLATSTEP_INLINE U32 shift_left(U32 a) {
  return {_mm512_slli_epi32(a.x, kBits)};
}
template <int kBits>
FLATSTEP_INLINE U32 shift_right(U32 a) {
  return {_mm512_srli_epi32(a.x, kBits)};
}
template <int kBits>
FLATSTEP_INLINE U32 shift_right_signed(U32 a) {
  return {_mm512_srai_epi32(a.x, kBits)};
}
FLATSTEP_INLINE U32 equal(U32 a, U32 b) {
  return {_mm512_movm_epi32(_mm512_cmpeq_epi32_mask(a.x, b.x))};
}
FLATSTEP_INLINE U32 bits_of(F32 a) { return {_mm512_castps_si512(a.x)}; }
FLATSTEP_INLINE F32 float_of(U32 a) { return {_mm512_castsi512_ps(a.x)}; }
FLATSTEP_INLINE U32 where_nan(F32 a, U32 then, U32 otherwise) {
  return {_mm512_mask_mov_epi32(otherwise.x, _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q), then.x)};
}

struct F64 {
  __m512d x;
};

FLATSTEP_INLINE F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.x, b.x)}; }
FLATSTEP_INLINE F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.x, b.x)}; }
FLATSTEP_INLINE F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.x, b.x)}; }
FLATSTEP_INLINE F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.x, b.x)}; }
FLATSTEP_INLINE F64 root(F64 a) { return {_mm512_sqrt_pd(a.x)}; }
FLATSTEP_INLINE F64 select(F64 side, F64 a, F64 b) {
  const __mmask8 set = _mm512_cmp_pd_mask(side.x, _mm512_setzero_pd(), _CMP_NEQ_UQ);
  return {_mm512_mask_blend_pd(set, b.x, a.x)};
}
FLATSTEP_INLINE F64 maximum(F64 a, F64 b) {
  const __mmask8 nan = _mm512_cmp_pd_mask(a.x, a.x, _CMP_UNORD_Q);
  return {_mm512_mask_blend_pd(nan, _mm512_max_pd(a.x, b.x), a.x)};
}
FLATSTEP_INLINE F64 snap(F64 a) {
  const __m512i bits = _mm512_castpd_si512(a.x);
  const __mmask8 normal = _mm512_test_epi64_mask(bits, _mm512_set1_epi64(0x7ff0000000000000));
  return {_mm512_maskz_mov_pd(normal, a.x)};
}

// Rounds to bfloat16 in the upper half of each lane; the lower half is left over.
FLATSTEP_INLINE __m512i round_to_high_half(F32 a) {
  const __m512i bits = _mm512_castps_si512(a.x);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  const __m512i half =
      _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  return _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), nan,
                               _mm512_set1_epi32(kBFloat16NaN << 16));
}

}  // namespace avx512

template <>
struct Lanes<avx512::F32> {
  static constexpr int kCount = 16;
  FLATSTEP_INLINE static avx512::F32 load(const float* from) { return {_mm512_loadu_ps(from)}; }
  FLATSTEP_INLINE static void load(const BFloat16* from, avx512::F32& even, avx512::F32& odd) {
    const __m512i both = _mm512_loadu_si512(from);
    even.x = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd.x = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(kHighHalf)));
  }
  FLATSTEP_INLINE static avx512::F32 load(const Float16* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  // In halves: streams pass through Zen 4 eight percent faster than with whole lines.
  FLATSTEP_INLINE static void store(float* to, avx512::F32 a) {
    _mm256_storeu_ps(to, _mm512_castps512_ps256(a.x));
    _mm256_storeu_ps(to + 8, _mm512_extractf32x8_ps(a.x, 1));
  }
  FLATSTEP_INLINE static void store(BFloat16* to, avx512::F32 even, avx512::F32 odd) {
    const __m512i low = _mm512_srli_epi32(avx512::round_to_high_half(even), 16);
    const __m512i high = avx512::round_to_high_half(odd);
    const __m512i mask = _mm512_set1_epi32(kHighHalf);
    // 0xca: high where mask, else low.
    _mm512_storeu_si512(to, _mm512_ternarylogic_epi32(mask, high, low, 0xca));
  }
  FLATSTEP_INLINE static void store(Float16* to, avx512::F32 a) {
    const __m256i rounded = _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
    const __m256i result = _mm256_mask_blend_epi16(nan, rounded, _mm256_set1_epi16(kFloat16NaN));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), result);
  }
  FLATSTEP_INLINE static avx512::F32 all(float x) { return {_mm512_set1_ps(x)}; }

  using Bits = avx512::U32;
  FLATSTEP_INLINE static Bits load_halves(const std::uint16_t* from) {
    return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  FLATSTEP_INLINE static Bits load_offsets(const std::uint16_t* from) {
    return {_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  FLATSTEP_INLINE static void store_halves(std::uint16_t* to, Bits a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(a.x));
  }
  FLATSTEP_INLINE static Bits load_bits(const void* from) { return {_mm512_loadu_si512(from)}; }
  FLATSTEP_INLINE static void store_bits(void* to, Bits a) { _mm512_storeu_si512(to, a.x); }
  FLATSTEP_INLINE static Bits all_bits(std::uint32_t x) {
    return {_mm512_set1_epi32(static_cast<int>(x))};
  }
  FLATSTEP_INLINE static Bits count_up() {
    return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
  }
};

template <>
struct Lanes<avx512::F64> {
  static constexpr int kCount = 8;
  FLATSTEP_INLINE static avx512::F64 load(const double* from) { return {_mm512_loadu_pd(from)}; }
  FLATSTEP_INLINE static avx512::F64 load(const float* from) {
    return {_mm512_cvtps_pd(_mm256_loadu_ps(from))};
  }
  FLATSTEP_INLINE static avx512::F64 load(const BFloat16* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
    return {_mm512_cvtps_pd(_mm256_castsi256_ps(bits))};
  }
  FLATSTEP_INLINE static avx512::F64 load(const Float16* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm512_cvtps_pd(_mm256_cvtph_ps(halves))};
  }
  FLATSTEP_INLINE static void store(double* to, avx512::F64 a) {
    _mm256_storeu_pd(to, _mm512_castpd512_pd256(a.x));
    _mm256_storeu_pd(to + 4, _mm512_extractf64x4_pd(a.x, 1));
  }
  FLATSTEP_INLINE static avx512::F64 all(double x) { return {_mm512_set1_pd(x)}; }
};

}  // namespace flatstep
