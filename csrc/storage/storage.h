// How a value lies in memory: the stored types, and their exact conversions to and from float.
#pragma once

#include <cstdint>

// Marks what runs on the host and on a device, and what must leave no symbol behind in an object
// compiled for one instruction set.
#if defined(__CUDACC__)
#define FLATSTEP_INLINE __host__ __device__ __forceinline__
#else
#define FLATSTEP_INLINE inline __attribute__((always_inline))
#endif

namespace flatstep {

// The types that memory can hold, by the names that torch gives them.
enum class Stored { kFloat32, kFloat64, kBFloat16, kFloat16, kInt16, kUnknown };

FLATSTEP_INLINE constexpr int size_of(Stored type) {
  constexpr int kSizes[] = {4, 8, 2, 2, 2, 0};
  return kSizes[static_cast<int>(type)];
}

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

inline constexpr std::uint16_t kBFloat16NaN = 0x7fc0;
inline constexpr std::uint16_t kFloat16NaN = 0x7e00;
// Of two 16-bit neighbours in 32 bits, the odd one.
inline constexpr int kHighHalf = static_cast<int>(0xffff0000);

FLATSTEP_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

FLATSTEP_INLINE std::uint64_t bits_of(double x) {
  std::uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

FLATSTEP_INLINE float float_of(std::uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

FLATSTEP_INLINE double double_of(std::uint64_t bits) {
  double x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

FLATSTEP_INLINE float widen(float x) { return x; }

FLATSTEP_INLINE float widen(BFloat16 x) { return float_of(std::uint32_t{x.bits} << 16); }

FLATSTEP_INLINE float widen(Float16 x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000U} << 16;
  const std::uint32_t rest = std::uint32_t{x.bits & 0x7fffU} << 13;
  if (rest >= 0x0f800000U) {  // infinity and NaN
    return float_of(sign | rest | 0x70000000U);
  }
  // Multiplying by 2^112 moves the exponent's bias and normalises a subnormal, exactly.
  return float_of(sign | bits_of(float_of(rest) * 0x1p112F));
}

FLATSTEP_INLINE void narrow(float* to, float x) { *to = x; }

FLATSTEP_INLINE void narrow(BFloat16* to, float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  to->bits = x != x ? kBFloat16NaN : static_cast<std::uint16_t>(rounded);
}

FLATSTEP_INLINE void narrow(Float16* to, float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t size = bits & 0x7fffffffU;
  std::uint32_t rounded;
  if (size >= 0x47800000U) {  // 2^16 and above, infinity, NaN
    rounded = size > 0x7f800000U ? kFloat16NaN : (sign | 0x7c00U);
  } else if (size < 0x38800000U) {  // below 2^-14: the sum's last bit is the subnormal's last bit
    rounded = sign | (bits_of(float_of(size) + 0.5F) - 0x3f000000U);
  } else {
    rounded = sign | ((size - 0x38000000U + 0xfffU + ((size >> 13) & 1U)) >> 13);
  }
  to->bits = static_cast<std::uint16_t>(rounded);
}

}  // namespace flatstep
