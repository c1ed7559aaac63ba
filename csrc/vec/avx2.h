// The value types of AVX2 with F16C: eight floats, four doubles.
#pragma once

#include <immintrin.h>

#include "vec/pair.h"

namespace flatstep {

namespace avx2 {

struct F32 {
  __m256 x;
};

FLATSTEP_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.x, b.x)}; }
FLATSTEP_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.x, b.x)}; }
FLATSTEP_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.x, b.x)}; }
FLATSTEP_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.x, b.x)}; }
FLATSTEP_INLINE F32 root(F32 a) { return {_mm256_sqrt_ps(a.x)}; }
FLATSTEP_INLINE F32 select(F32 side, F32 a, F32 b) {
  return {_mm256_blendv_ps(b.x, a.x, _mm256_cmp_ps(side.x, _mm256_setzero_ps(), _CMP_NEQ_UQ))};
}
FLATSTEP_INLINE F32 maximum(F32 a, F32 b) {
  return {_mm256_blendv_ps(_mm256_max_ps(a.x, b.x), a.x, _mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q))};
}
FLATSTEP_INLINE F32 snap(F32 a) {
  const __m256i exponent =
      _mm256_and_si256(_mm256_castps_si256(a.x), _mm256_set1_epi32(0x7f800000));
  const __m256i zero = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
  return {_mm256_andnot_ps(_mm256_castsi256_ps(zero), a.x)};
}

struct U32 {
  __m256i x;
};

FLATSTEP_INLINE U32 operator+(U32 a, U32 b) { return {_mm256_add_epi32(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator-(U32 a, U32 b) { return {_mm256_sub_epi32(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator*(U32 a, U32 b) { return {_mm256_mullo_epi32(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator&(U32 a, U32 b) { return {_mm256_and_si256(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator|(U32 a, U32 b) { return {_mm256_or_si256(a.x, b.x)}; }
FLATSTEP_INLINE U32 operator^(U32 a, U32 b) { return {_mm256_xor_si256(a.x, b.x)}; }
template <int kBits>
FLATSTEP_INLINE U32 shift_left(U32 a) {
  return {_mm256_slli_epi32(a.x, kBits)};
}
template <int kBits>
FLATSTEP_INLINE U32 shift_right(U32 a) {
  return {_mm256_srli_epi32(a.x, kBits)};
}
template <int kBits>
FLATSTEP_INLINE U32 shift_right_signed(U32 a) {
  return {_mm256_srai_epi32(a.x, kBits)};
}
FLATSTEP_INLINE U32 equal(U32 a, U32 b) { return {_mm256_cmpeq_epi32(a.x, b.x)}; }
FLATSTEP_INLINE U32 bits_of(F32 a) { return {_mm256_castps_si256(a.x)}; }
FLATSTEP_INLINE F32 float_of(U32 a) { return {_mm256_castsi256_ps(a.x)}; }
FLATSTEP_INLINE U32 where_nan(F32 a, U32 then, U32 otherwise) {
  const __m256 nan = _mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q);
  return {_mm256_blendv_epi8(otherwise.x, then.x, _mm256_castps_si256(nan))};
}

struct F64 {
  __m256d x;
};

FLATSTEP_INLINE F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.x, b.x)}; }
FLATSTEP_INLINE F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.x, b.x)}; }
FLATSTEP_INLINE F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.x, b.x)}; }
FLATSTEP_INLINE F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.x, b.x)}; }
FLATSTEP_INLINE F64 root(F64 a) { return {_mm256_sqrt_pd(a.x)}; }
FLATSTEP_INLINE F64 select(F64 side, F64 a, F64 b) {
  return {_mm256_blendv_pd(b.x, a.x, _mm256_cmp_pd(side.x, _mm256_setzero_pd(), _CMP_NEQ_UQ))};
}
FLATSTEP_INLINE F64 maximum(F64 a, F64 b) {
  return {_mm256_blendv_pd(_mm256_max_pd(a.x, b.x), a.x, _mm256_cmp_pd(a.x, a.x, _CMP_UNORD_Q))};
}
FLATSTEP_INLINE F64 snap(F64 a) {
  const __m256i exponent =
      _mm256_and_si256(_mm256_castpd_si256(a.x), _mm256_set1_epi64x(0x7ff0000000000000));
  const __m256i zero = _mm256_cmpeq_epi64(exponent, _mm256_setzero_si256());
  return {_mm256_andnot_pd(_mm256_castsi256_pd(zero), a.x)};
}

// Rounds to bfloat16 in the upper half of each lane; the lower half is left over.
FLATSTEP_INLINE __m256i round_to_high_half(F32 a) {
  const __m256i bits = _mm256_castps_si256(a.x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i canonical = _mm256_set1_epi32(kBFloat16NaN << 16);
  const __m256 nan = _mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(sum, canonical, _mm256_castps_si256(nan));
}

}  // namespace avx2

template <>
struct Lanes<avx2::F32> {
  static constexpr int kCount = 8;
  FLATSTEP_INLINE static avx2::F32 load(const float* from) { return {_mm256_loadu_ps(from)}; }
  FLATSTEP_INLINE static void load(const BFloat16* from, avx2::F32& even, avx2::F32& odd) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    even.x = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    odd.x = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(kHighHalf)));
  }
  FLATSTEP_INLINE static avx2::F32 load(const Float16* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  FLATSTEP_INLINE static void store(float* to, avx2::F32 a) { _mm256_storeu_ps(to, a.x); }
  FLATSTEP_INLINE static void store(BFloat16* to, avx2::F32 even, avx2::F32 odd) {
    const __m256i low = _mm256_srli_epi32(avx2::round_to_high_half(even), 16);
    const __m256i high = avx2::round_to_high_half(odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_blend_epi16(low, high, 0xaa));
  }
  FLATSTEP_INLINE static void store(Float16* to, avx2::F32 a) {
    const __m128i rounded = _mm256_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q));
    const __m128i mask =
        _mm_packs_epi32(_mm256_castsi256_si128(nan), _mm256_extracti128_si256(nan, 1));
    const __m128i result = _mm_blendv_epi8(rounded, _mm_set1_epi16(kFloat16NaN), mask);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), result);
  }
  FLATSTEP_INLINE static avx2::F32 all(float x) { return {_mm256_set1_ps(x)}; }

  using Bits = avx2::U32;
  FLATSTEP_INLINE static Bits load_halves(const std::uint16_t* from) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  FLATSTEP_INLINE static Bits load_offsets(const std::uint16_t* from) {
    return {_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  // Of lanes that hold no more than 16 bits the packing saturates nothing.
  FLATSTEP_INLINE static void store_halves(std::uint16_t* to, Bits a) {
    const __m256i low = _mm256_and_si256(a.x, _mm256_set1_epi32(0xffff));
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }
  FLATSTEP_INLINE static Bits load_bits(const void* from) {
    return {_mm256_loadu_si256(static_cast<const __m256i*>(from))};
  }
  FLATSTEP_INLINE static void store_bits(void* to, Bits a) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), a.x);
  }
  FLATSTEP_INLINE static Bits all_bits(std::uint32_t x) {
    return {_mm256_set1_epi32(static_cast<int>(x))};
  }
  FLATSTEP_INLINE static Bits count_up() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
};

template <>
struct Lanes<avx2::F64> {
  static constexpr int kCount = 4;
  FLATSTEP_INLINE static avx2::F64 load(const double* from) { return {_mm256_loadu_pd(from)}; }
  FLATSTEP_INLINE static avx2::F64 load(const float* from) {
    return {_mm256_cvtps_pd(_mm_loadu_ps(from))};
  }
  FLATSTEP_INLINE static avx2::F64 load(const BFloat16* from) {
    const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i bits = _mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16);
    return {_mm256_cvtps_pd(_mm_castsi128_ps(bits))};
  }
  FLATSTEP_INLINE static avx2::F64 load(const Float16* from) {
    return {_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))))};
  }
  FLATSTEP_INLINE static void store(double* to, avx2::F64 a) { _mm256_storeu_pd(to, a.x); }
  FLATSTEP_INLINE static avx2::F64 all(double x) { return {_mm256_set1_pd(x)}; }
};

}  // namespace flatstep
