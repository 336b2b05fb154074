// Vectors of kLanes floats in GCC/Clang vector extensions, one namespace for each instruction set. Included once by each
// csrc/cpu/<isa>.cpp, compiled with that set's flags. Standard headers come first; inside the namespace nothing of the
// standard library is called, so no inline copy of it compiled for AVX-512 can be linked into a baseline path.
#pragma once
#include <omp.h>
#include <time.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"

#define LLMFAST_INLINE static inline __attribute__((always_inline))
#define LLMFAST_UNROLL _Pragma("GCC unroll 32")

namespace llmfast::cpu::LLMFAST_ISA {

constexpr int kLanes = LLMFAST_LANES;
typedef float vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t ivec __attribute__((vector_size(kLanes * 4)));
typedef float uvec __attribute__((vector_size(kLanes * 4), aligned(4)));

constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

LLMFAST_INLINE vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
LLMFAST_INLINE vec loadu(const float* p) { return *reinterpret_cast<const uvec*>(p); }
LLMFAST_INLINE void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
LLMFAST_INLINE void storeu(float* p, vec x) { *reinterpret_cast<uvec*>(p) = x; }
LLMFAST_INLINE vec splat(float x) { return x - vec{}; }
// b when either is NaN
LLMFAST_INLINE vec max(vec a, vec b) { return a > b ? a : b; }

template <class T>
LLMFAST_INLINE T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
LLMFAST_INLINE T max(T a, T b) {
  return a > b ? a : b;
}

// 2^x; relative error 1.5e-7; 0 below 2^-126 and for -inf; NaN passes. x <= 127.
LLMFAST_INLINE vec exp2(vec x) {
  x = max(splat(-127.f), x);
  vec t = x + 12582912.f;  // 1.5 * 2^23: rounds to an integer in the low bits
  vec f = x - (t - 12582912.f);
  vec p = splat(1.3390863e-3f);
  p = p * f + 9.6739964e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022244e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.f;
  return p * (vec)(((ivec)t << 23) + (127 << 23));
}

// Elements as they lie in memory.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

LLMFAST_INLINE float to_float(float x) { return x; }
LLMFAST_INLINE float to_float(bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
LLMFAST_INLINE float to_float(f16 x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#else
  uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu, u;
  float f;
  if (rest >= 0x7c00) {
    u = sign | 0x7f800000u | (rest & 0x3ff) << 13;
  } else {  // 2^112 scales the exponent's bias, denormals included
    u = rest << 13;
    __builtin_memcpy(&f, &u, 4);
    f *= 5.192296858534828e33f;
    __builtin_memcpy(&u, &f, 4);
    u |= sign;
  }
  __builtin_memcpy(&f, &u, 4);
  return f;
#endif
}

LLMFAST_INLINE void from_float(float* p, float x) { *p = x; }
LLMFAST_INLINE void from_float(bf16* p, float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
LLMFAST_INLINE void from_float(f16* p, float x) {
#ifdef __F16C__
  p->bits = static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  uint32_t u, sign;
  __builtin_memcpy(&u, &x, 4);
  sign = u >> 16 & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) {
    p->bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (u >= 0x47800000u) {
    p->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (u < 0x38800000u) {  // denormal: adding 2^-1 * 2^-14 * 2^... leaves the rounded bits in the low end
    float f, magic = 0.5f;
    __builtin_memcpy(&f, &u, 4);
    f += magic;
    __builtin_memcpy(&u, &f, 4);
    p->bits = static_cast<uint16_t>(sign | (u - 0x3f000000u));
  } else {
    u += 0xc8000fffu + (u >> 13 & 1);
    p->bits = static_cast<uint16_t>(sign | u >> 13);
  }
#endif
}

// Scratch that grows and stays with its thread.
struct Scratch {
  char* data = nullptr;
  size_t size = 0;
  float* floats(size_t n) {
    n = (n * 4 + 63) / 64 * 64;
    if (n > size) {
      free(data);
      data = static_cast<char*>(aligned_alloc(64, size = n));
      if (!data) abort();
    }
    return reinterpret_cast<float*>(data);
  }
  ~Scratch() { free(data); }
};

}  // namespace llmfast::cpu::LLMFAST_ISA
