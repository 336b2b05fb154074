// Vectors of kLanes floats in GCC/Clang vector extensions, one namespace for each instruction set. Included once by
// each csrc/cpu/<isa>.cpp, compiled with that set's flags. Standard headers come first; inside the namespace nothing of
// the standard library is called, so no inline copy of it compiled for AVX-512 can be linked into a baseline path.
#pragma once
#include <omp.h>
#include <time.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of the undefined vectors in its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/kernels.h"

#define LLMFAST_INLINE static inline __attribute__((always_inline))
#define LLMFAST_UNROLL _Pragma("GCC unroll 32")

namespace llmfast::cpu::LLMFAST_ISA {

constexpr int kLanes = LLMFAST_LANES;
typedef float vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t ivec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t wvec __attribute__((vector_size(kLanes * 4)));
typedef double dvec __attribute__((vector_size(kLanes * 4)));
typedef int64_t lvec __attribute__((vector_size(kLanes * 4)));
typedef uint64_t ulvec __attribute__((vector_size(kLanes * 4)));
typedef float uvec __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t uivec
    __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));  // bf16 pairs start at any element
typedef double udvec __attribute__((vector_size(kLanes * 4), aligned(8)));
// The vector of a compute type: vec for float, dvec (half the lanes) for double.
template <class C>
using vec_of = std::conditional_t<std::is_same_v<C, double>, dvec, vec>;
template <class C>
constexpr int kLanesOf = kLanes * 4 / static_cast<int>(sizeof(C));

// The vector registers of this instruction set: what the tiles of accumulators are made for.
#if LLMFAST_LANES == 16 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Dot products summed at a time: as many chains as hide the latency of an addition, in whole vectors of results.
constexpr int kDots = kRegisters / 2 > kLanes ? kRegisters / 2 : kLanes;

constexpr float kInf = __builtin_inff();
template <class C>
constexpr C kInfOf = static_cast<C>(__builtin_inf());
#if defined(__OPTIMIZE__) && (defined(__FMA__) || defined(__ARM_FEATURE_FMA))  // -O0 contracts nothing
constexpr bool kFma = true;
#else
constexpr bool kFma = false;
#endif
constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

LLMFAST_INLINE vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
LLMFAST_INLINE vec loadu(const float* p) { return *reinterpret_cast<const uvec*>(p); }
LLMFAST_INLINE void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
LLMFAST_INLINE void storeu(float* p, vec x) { *reinterpret_cast<uvec*>(p) = x; }
LLMFAST_INLINE vec splat(float x) { return x - vec{}; }
LLMFAST_INLINE ivec load(const int32_t* p) { return *reinterpret_cast<const ivec*>(p); }
LLMFAST_INLINE ivec loadu(const int32_t* p) { return *reinterpret_cast<const uivec*>(p); }
LLMFAST_INLINE void store(int32_t* p, ivec x) { *reinterpret_cast<ivec*>(p) = x; }
LLMFAST_INLINE void storeu(int32_t* p, ivec x) { *reinterpret_cast<uivec*>(p) = x; }
LLMFAST_INLINE ivec splat(int32_t x) { return x - ivec{}; }
LLMFAST_INLINE dvec load(const double* p) { return *reinterpret_cast<const dvec*>(p); }
LLMFAST_INLINE dvec loadu(const double* p) { return *reinterpret_cast<const udvec*>(p); }
LLMFAST_INLINE void store(double* p, dvec x) { *reinterpret_cast<dvec*>(p) = x; }
LLMFAST_INLINE void storeu(double* p, dvec x) { *reinterpret_cast<udvec*>(p) = x; }
LLMFAST_INLINE dvec splat(double x) { return x - dvec{}; }
// b when either is NaN (on NEON: NaN); GCC makes a comparison and a blend of a > b ? a : b
#if LLMFAST_LANES == 16
LLMFAST_INLINE vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
LLMFAST_INLINE vec min(vec a, vec b) { return _mm512_min_ps(a, b); }
LLMFAST_INLINE dvec max(dvec a, dvec b) { return _mm512_max_pd(a, b); }
LLMFAST_INLINE dvec min(dvec a, dvec b) { return _mm512_min_pd(a, b); }
#elif LLMFAST_LANES == 8
LLMFAST_INLINE vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
LLMFAST_INLINE vec min(vec a, vec b) { return _mm256_min_ps(a, b); }
LLMFAST_INLINE dvec max(dvec a, dvec b) { return _mm256_max_pd(a, b); }
LLMFAST_INLINE dvec min(dvec a, dvec b) { return _mm256_min_pd(a, b); }
#elif defined(__aarch64__)
LLMFAST_INLINE vec max(vec a, vec b) { return vmaxq_f32(a, b); }
LLMFAST_INLINE vec min(vec a, vec b) { return vminq_f32(a, b); }
LLMFAST_INLINE dvec max(dvec a, dvec b) { return vmaxq_f64(a, b); }
LLMFAST_INLINE dvec min(dvec a, dvec b) { return vminq_f64(a, b); }
#else
LLMFAST_INLINE vec max(vec a, vec b) { return a > b ? a : b; }
LLMFAST_INLINE vec min(vec a, vec b) { return a < b ? a : b; }
LLMFAST_INLINE dvec max(dvec a, dvec b) { return a > b ? a : b; }
LLMFAST_INLINE dvec min(dvec a, dvec b) { return a < b ? a : b; }
#endif
LLMFAST_INLINE vec abs(vec x) { return (vec)((ivec)x & 0x7fffffff); }
LLMFAST_INLINE dvec abs(dvec x) { return x < 0 ? -x : x; }

template <class T>
LLMFAST_INLINE T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
LLMFAST_INLINE T max(T a, T b) {
  return a > b ? a : b;
}

// 2^f for f in [-0.5, 0.5]; relative error 1.7e-7 (float), 3e-16 (double)
constexpr float kFraction[] = {1.3264698e-3f, 9.6715344e-3f, 5.5507340e-2f, 2.4022242e-1f, 6.9314700e-1f, 1.f};
LLMFAST_INLINE vec exp2_fraction(vec f) {
  vec p = splat(kFraction[0]);
  LLMFAST_UNROLL
  for (int n = 1; n < 6; n++) p = p * f + kFraction[n];
  return p;
}
LLMFAST_INLINE dvec exp2_fraction(dvec f) {
  constexpr double kTaylor[] = {1.3691488853904124e-12, 2.5678435993488196e-11,
                                4.44553827187081e-10,   7.054911620801121e-09,
                                1.0178086009239696e-07, 1.3215486790144305e-06,
                                1.5252733804059838e-05, 1.5403530393381606e-04,
                                1.3333558146428441e-03, 9.618129107628477e-03,
                                5.5504108664821576e-02, 2.402265069591007e-01,
                                6.931471805599453e-01,  1.0};  // ln(2)^n / n!
  dvec p = splat(0.0);
  LLMFAST_UNROLL
  for (double t : kTaylor) p = p * f + t;
  return p;
}

// 1.5 * 2^23 and 1.5 * 2^52: what is added to it is rounded to an integer, in the low bits.
template <class C>
constexpr C kRound = std::is_same_v<C, float> ? C(12582912) : C(6755399441055744);
// 2^i of t = kRound + i for i > -127; 0 for i = -127.
LLMFAST_INLINE vec exponent(vec t) { return (vec)(((wvec)t << 23) + (127u << 23)); }

// 2^(x c) for x c <= 127 and c > 1e-30, fraction(f) being 2^f; 0 below 2^-126 and for -inf; NaN passes. The product
// enters rounded only once.
template <class F>
LLMFAST_INLINE vec exp2_by(vec x, float c, F&& fraction) {
  x = max(splat(-127.f / c), x);
  vec t = x * c + kRound<float>;
  vec f = x * c - (t - kRound<float>);
  return fraction(f) * exponent(t);
}
LLMFAST_INLINE vec exp2(vec x, float c) {
  return exp2_by(x, c, [](vec f) __attribute__((always_inline)) { return exp2_fraction(f); });
}
// The same of K vectors in step: on AVX2 the chains of one vector after another fill the scheduler, and 4 in step take
// two thirds of the time (Zen 3); g++ keeps the order only of values that an asm has seen.
constexpr int kInStep = LLMFAST_LANES == 8 ? 4 : 2;
LLMFAST_INLINE vec in_step(vec x) {
#if LLMFAST_LANES == 8
  asm("" : "+x"(x));
#endif
  return x;
}
template <int K>
LLMFAST_INLINE void exp2(vec (&x)[K], float c) {
  auto each = [](auto&& f) __attribute__((always_inline)) {
    LLMFAST_UNROLL
    for (int i = 0; i < K; i++) f(i);
  };
  vec t[K], f[K], p[K];
  each([&](int i) { x[i] = in_step(max(splat(-127.f / c), x[i])); });
  each([&](int i) { t[i] = in_step(x[i] * c + kRound<float>); });
  each([&](int i) { f[i] = in_step(t[i] - kRound<float>); });
  each([&](int i) { f[i] = in_step(x[i] * c - f[i]); });
  each([&](int i) { p[i] = splat(kFraction[0]); });
  LLMFAST_UNROLL
  for (int n = 1; n < 6; n++) each([&](int i) { p[i] = in_step(p[i] * f[i] + kFraction[n]); });
  each([&](int i) { t[i] = in_step(exponent(t[i])); });
  each([&](int i) { x[i] = p[i] * t[i]; });
}
// 2^f for |f| <= 1/2 to a relative error of 2.6e-6, for what is rounded to bf16 next.
LLMFAST_INLINE vec exp2_fraction4(vec f) {
  vec p = splat(9.5701096e-3f) * f + 5.5917899e-2f;
  p = p * f + 2.4024745e-1f;
  p = p * f + 6.9312181e-1f;
  return p * f + 9.9999926e-1f;
}
LLMFAST_INLINE vec exp2_coarse(vec x, float c) {
  return exp2_by(x, c, [](vec f) __attribute__((always_inline)) { return exp2_fraction4(f); });
}
LLMFAST_INLINE dvec exp2(dvec x, double c) {  // c is log2(e)
  x = max(splat(-1023. / c), x);
  constexpr double round = kRound<double>;
  dvec t = x * c + round;
  dvec f = x * c - (t - round) + x * (c * 1.4109e-17);  // what log2(e) has beyond a double
  return exp2_fraction(f) * (dvec)(((ulvec)t << 52) + (uint64_t{1023} << 52));
}
template <int K>
LLMFAST_INLINE void exp2(dvec (&x)[K], double c) {
  LLMFAST_UNROLL
  for (int i = 0; i < K; i++) x[i] = exp2(x[i], c);
}
LLMFAST_INLINE vec exp2(vec x) { return exp2(x, 1.f); }
// 2^f for |f| <= 1/2, relative error 2e-9 before rounding.
LLMFAST_INLINE vec exp2_fraction6(vec f) {
  vec p = splat(1.5353340e-4f) * f + 1.3398901e-3f;
  p = p * f + 9.6184378e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  return p * f + 1.f;
}
// 2^(x c) for a factor known in float64: relative error 8e-8.
LLMFAST_INLINE vec exp2_fine(vec x, double c) {
  const float high = static_cast<float>(c), low = static_cast<float>(c - high);
  x = max(splat(-127.f / high), x);
  vec t = x * high + kRound<float>;
  vec f = (x * high - (t - kRound<float>)) + x * low;
  return exp2_fraction6(f) * exponent(t);
}
LLMFAST_INLINE dvec exp2_fine(dvec x, double c) { return exp2(x, c); }
// e^x for x <= 87, relative error 8e-8; 0 below e^-87 and for -inf; NaN passes. n ln(2) leaves x in two exact parts,
// and 1 + (r + r^2 p(r)) rounds but once where it matters (coefficients of Cephes' expf).
LLMFAST_INLINE vec exp(vec x) {
  x = max(splat(-88.02f), x);
  vec t = x * kLog2e + kRound<float>, n = t - kRound<float>;
  vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f) * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * (r * r) + r + 1.f) * exponent(t);
}

// Elements as they lie in memory.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

LLMFAST_INLINE float to_float(float x) { return x; }
LLMFAST_INLINE double to_float(double x) { return x; }
LLMFAST_INLINE float to_float(uint8_t x) { return x; }
LLMFAST_INLINE float to_float(bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
LLMFAST_INLINE float to_float(f16 x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 h;
  __builtin_memcpy(&h, &x, 2);
  return h;
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
#elif defined(__aarch64__)
  const __fp16 h = static_cast<__fp16>(x);
  __builtin_memcpy(p, &h, 2);
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

// Unaligned vectors of elements as they lie in memory, widened to the compute type and rounded (to nearest even) from
// it.
#if defined(__aarch64__)  // GCC 12 takes a half vector apart in general registers to convert it
LLMFAST_INLINE vec loadu(const bf16* p) {
  uint16x4_t h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vec)vshll_n_u16(h, 16);
}
LLMFAST_INLINE vec loadu(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))))));
}
#else
LLMFAST_INLINE vec loadu(const bf16* p) {
  typedef uint16_t half __attribute__((vector_size(kLanes * 2)));
  half h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, wvec) << 16);
}
LLMFAST_INLINE vec loadu(const uint8_t* p) {
  typedef uint8_t bytes __attribute__((vector_size(kLanes)));
  bytes b;
  __builtin_memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, vec);
}
#endif
LLMFAST_INLINE void storeu(bf16* p, vec x) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
#else
  typedef uint16_t half __attribute__((vector_size(kLanes * 2)));
  wvec u = (wvec)x;
  wvec r = (x != x) ? wvec{} + 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
  half h = __builtin_convertvector(r, half);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}
#if LLMFAST_LANES == 16
LLMFAST_INLINE vec loadu(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LLMFAST_INLINE void storeu(f16* p, vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif LLMFAST_LANES == 8
LLMFAST_INLINE vec loadu(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
LLMFAST_INLINE void storeu(f16* p, vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
LLMFAST_INLINE vec loadu(const f16* p) {
  float16x4_t h;
  __builtin_memcpy(&h, p, sizeof h);
  return vcvt_f32_f16(h);
}
LLMFAST_INLINE void storeu(f16* p, vec x) {
  const float16x4_t h = vcvt_f16_f32(x);
  __builtin_memcpy(p, &h, sizeof h);
}
#else
LLMFAST_INLINE vec loadu(const f16* p) {
  vec x;
  LLMFAST_UNROLL
  for (int i = 0; i < kLanes; i++) x[i] = to_float(p[i]);
  return x;
}
LLMFAST_INLINE void storeu(f16* p, vec x) {
  LLMFAST_UNROLL
  for (int i = 0; i < kLanes; i++) from_float(p + i, x[i]);
}
#endif

// Stores past the caches, to an address aligned to what is stored; drain() before another thread reads them.
template <class T, class V>
LLMFAST_INLINE void stream(T* p, V x) {
  storeu(p, x);
}
#if LLMFAST_LANES == 16
LLMFAST_INLINE void stream(float* p, vec x) { _mm512_stream_ps(p, x); }
#elif LLMFAST_LANES == 8
LLMFAST_INLINE void stream(float* p, vec x) { _mm256_stream_ps(p, x); }
#endif
#ifdef __AVX512BF16__
LLMFAST_INLINE void stream(bf16* p, vec x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}
#endif
LLMFAST_INLINE void drain() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first n lanes only, n < the vector's lanes: nothing beyond is read (those lanes are 0) or written.
template <class T>
LLMFAST_INLINE auto load_part(const T* p, int64_t n) {
  alignas(64) T whole[64 / sizeof(T)] = {};
  for (int64_t i = 0; i < n; i++) whole[i] = p[i];
  return loadu(whole);
}
template <class T, class V>
LLMFAST_INLINE void store_part(T* p, V x, int64_t n) {
  alignas(64) T whole[64 / sizeof(T)];
  storeu(whole, x);
  for (int64_t i = 0; i < n; i++) p[i] = whole[i];
}
#if LLMFAST_LANES == 16
LLMFAST_INLINE vec load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
LLMFAST_INLINE ivec load_part(const int32_t* p, int64_t n) { return (ivec)_mm512_maskz_loadu_epi32((1u << n) - 1, p); }
LLMFAST_INLINE vec load_part(const bf16* p, int64_t n) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1u << n) - 1, p)), 16);
}
LLMFAST_INLINE ivec load_pairs_part(const bf16* p, int64_t n) {  // the pairs of n < 32 elements
  return (ivec)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
}
LLMFAST_INLINE vec load_part(const f16* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << n) - 1, p));
}
LLMFAST_INLINE void store_part(float* p, vec x, int64_t n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, x); }
#endif

// 0, 1, 2, ... as floats, doubles or int32
template <class C, int... I>
LLMFAST_INLINE auto iota(std::integer_sequence<int, I...>) {
  typedef C V __attribute__((vector_size(kLanes * 4)));
  return V{static_cast<C>(I)...};
}
template <class C>
LLMFAST_INLINE auto iota() {
  return iota<C>(std::make_integer_sequence<int, kLanesOf<C>>{});
}

// n bytes (4, 8, ... to a whole vector), as many times as they fit.
template <int n>
LLMFAST_INLINE vec repeat(const void* p) {
  if constexpr (n == 4 || n == 8) {
    std::conditional_t<n == 4, int32_t, int64_t> x;
    __builtin_memcpy(&x, p, n);
    return (vec)(x - std::conditional_t<n == 4, ivec, lvec>{});
#if LLMFAST_LANES == 16
  } else if constexpr (n == 16) {
    return _mm512_broadcast_f32x4(_mm_loadu_ps(static_cast<const float*>(p)));
  } else if constexpr (n == 32) {
    return _mm512_broadcast_f32x8(_mm256_loadu_ps(static_cast<const float*>(p)));
#elif LLMFAST_LANES == 8
  } else if constexpr (n == 16) {
    return _mm256_broadcast_ps(static_cast<const __m128*>(p));
#endif
  } else {
    static_assert(n == sizeof(vec));
    return loadu(static_cast<const float*>(p));
  }
}

// The low or high halves of a and b, lanes alternating: a0 b0 a1 b1 ...
template <class V, int... I>
LLMFAST_INLINE V zip_low(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * static_cast<int>(sizeof...(I)))...);
}
template <class V, int... I>
LLMFAST_INLINE V zip_high(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 2 + L / 2 + I % 2 * L)...);
}

// r[i][j] -> r[j][i] for a square of whole vectors: each zip of rows i and i + L/2 turns (row, lane) one bit round.
template <class V, int L = sizeof(V) / sizeof(V{}[0])>
LLMFAST_INLINE void transpose(V (&r)[L]) {
  constexpr std::make_integer_sequence<int, L> lanes{};
  LLMFAST_UNROLL
  for (int n = 1; n < L; n *= 2) {
    V t[L];
    LLMFAST_UNROLL
    for (int i = 0; i < L / 2; i++) {
      t[2 * i] = zip_low(r[i], r[i + L / 2], lanes);
      t[2 * i + 1] = zip_high(r[i], r[i + L / 2], lanes);
    }
    LLMFAST_UNROLL
    for (int i = 0; i < L; i++) r[i] = t[i];
  }
}

// Lane i of a, or of b where i has bit n; and the same of lane i ^ n.
template <int n, class V, int... I>
LLMFAST_INLINE V near(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I & n ? I + static_cast<int>(sizeof...(I)) : I)...);
}
template <int n, class V, int... I>
LLMFAST_INLINE V far(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I & n ? (I ^ n) + static_cast<int>(sizeof...(I)) : I ^ n)...);
}

// Of K vectors of (R, K) lanes the K sums of each of the R rows: one vector (R, K).
template <int K, class V>
LLMFAST_INLINE V sums(V* r) {
  constexpr int n = K / 2;
  constexpr std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])> lanes{};
  if constexpr (n > 0) {
    LLMFAST_UNROLL
    for (int i = 0; i < n; i++) r[i] = near<n>(r[i], r[i + n], lanes) + far<n>(r[i], r[i + n], lanes);
    return sums<n>(r);
  } else {
    return r[0];
  }
}
// The greatest lane; what a NaN does to it depends on where it is.
template <class V>
LLMFAST_INLINE auto greatest(V x) {
  constexpr int L = sizeof(V) / sizeof(x[0]);
  alignas(64) decltype(x[0] + x[0]) m[L];
  store(m, x);
  LLMFAST_UNROLL
  for (int half = L / 2; half; half /= 2) LLMFAST_UNROLL
  for (int i = 0; i < half; i++) m[i] = m[i] > m[i + half] ? m[i] : m[i + half];
  return m[0];
}
#if LLMFAST_LANES == 16  // in registers: a row of 512 floats has only 32 vectors
LLMFAST_INLINE float greatest(vec x) { return _mm512_reduce_max_ps(x); }
#elif defined(__aarch64__)
LLMFAST_INLINE float greatest(vec x) { return vmaxvq_f32(x); }
#endif
template <class V>
LLMFAST_INLINE auto sum(V x) {
  constexpr int L = sizeof(V) / sizeof(x[0]);
  auto y = x[0];
  LLMFAST_UNROLL
  for (int i = 1; i < L; i++) y += x[i];
  return y;
}

// bf16 pairs: the low half of each 32 bits is the even element, the high half the odd one.
#ifdef __AVX512BF16__
constexpr bool kDotBf16 = true;
LLMFAST_INLINE vec dot(vec acc, ivec a, ivec b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
// Two rows of floats rounded to bf16: apart, or as pairs.
struct Rounded {
  typedef int16_t shorts __attribute__((vector_size(64)));
  shorts x;
  ivec pairs() const {
    return (ivec)__builtin_shufflevector(x, x, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10,
                                         26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  void store_first(bf16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256((__m512i)x));
  }
  void store_second(bf16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_extracti64x4_epi64((__m512i)x, 1));
  }
};
LLMFAST_INLINE Rounded rounded(vec first, vec second) { return {(Rounded::shorts)_mm512_cvtne2ps_pbh(second, first)}; }
#else
constexpr bool kDotBf16 = false;
LLMFAST_INLINE vec dot(vec acc, ivec a, ivec b) {
  acc += (vec)(a << 16) * (vec)(b << 16);
  return acc + (vec)(a & -65536) * (vec)(b & -65536);
}
struct Rounded {
  vec first, second;
  ivec pairs() const {
    auto round = [](vec x) { return (x != x) ? wvec{} + 0x7fc0u : ((wvec)x + 0x7fffu + ((wvec)x >> 16 & 1)) >> 16; };
    return (ivec)(round(first) | round(second) << 16);
  }
  void store_first(bf16* p) const { storeu(p, first); }
  void store_second(bf16* p) const { storeu(p, second); }
};
LLMFAST_INLINE Rounded rounded(vec first, vec second) { return {first, second}; }
#endif
LLMFAST_INLINE ivec pairs(vec even, vec odd) { return rounded(even, odd).pairs(); }
// Two vectors of neighbours. kMixed: the lanes of two vectors of bf16 are exchanged, the even elements in the first, so
// that one shift or one mask widens them; store_two puts them back.
template <bool kMixed, class T, class V>
LLMFAST_INLINE void load_two(const T* p, V& first, V& second) {
  if constexpr (kMixed && std::is_same_v<T, bf16>) {
    ivec pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    first = (vec)(pair << 16), second = (vec)(pair & -65536);
  } else {
    first = loadu(p), second = loadu(p + sizeof(V) / sizeof(first[0]));
  }
}
template <bool kMixed, class T, class V>
LLMFAST_INLINE void store_two(T* p, V first, V second) {
  if constexpr (kMixed && std::is_same_v<T, bf16>) {
    const ivec pair = pairs(first, second);
    __builtin_memcpy(p, &pair, sizeof(pair));
  } else {
    storeu(p, first), storeu(p + sizeof(V) / sizeof(first[0]), second);
  }
}
// The neighbours in their order again.
LLMFAST_INLINE void unmix(vec& even, vec& odd) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  const vec first = zip_low(even, odd, lanes);
  odd = zip_high(even, odd, lanes), even = first;
}
// 2 kLanes elements of two rows a and b as pairs (a[i], b[i]): lanes [0, kLanes) and [kLanes, 2 kLanes).
LLMFAST_INLINE void interleave(ivec a, ivec b, ivec& low, ivec& high) {
  typedef int16_t shorts __attribute__((vector_size(kLanes * 4)));
  constexpr std::make_integer_sequence<int, kLanes * 2> lanes{};
  low = (ivec)zip_low((shorts)a, (shorts)b, lanes);
  high = (ivec)zip_high((shorts)a, (shorts)b, lanes);
}

LLMFAST_INLINE vec tanh(vec x) {
  vec z = x * x;  // |x| < 0.64: x + x^3 P(x^2), relative error 6e-9
  vec small = splat(-5.603889934718609e-3f) * z + 2.0551694557070732e-2f;
  small = small * z - 5.3714100271463394e-2f;
  small = small * z + 1.3331152498722076e-1f;
  small = small * z - 3.3333271741867065e-1f;
  small = x + x * (z * small);
  vec y = abs(x), e = exp2(y * -2.f, kLog2e);
  vec large = (1.f - e) / (1.f + e);
  large = x < 0.f ? -large : large;
  return y < 0.64f ? small : large;
}
LLMFAST_INLINE dvec tanh(dvec x) {
  LLMFAST_UNROLL
  for (int i = 0; i < kLanesOf<double>; i++) x[i] = __builtin_tanh(x[i]);
  return x;
}

// high and low words of a * m
LLMFAST_INLINE void multiply_wide(wvec a, uint32_t m, wvec& high, wvec& low) {
  typedef uint64_t u64 __attribute__((vector_size(kLanes * 4)));
  u64 even, odd;
#if LLMFAST_LANES == 16
  const __m512i b = _mm512_set1_epi64(m);
  even = (u64)_mm512_mul_epu32((__m512i)a, b), odd = (u64)_mm512_mul_epu32((__m512i)((u64)a >> 32), b);
#elif LLMFAST_LANES == 8
  const __m256i b = _mm256_set1_epi64x(m);
  even = (u64)_mm256_mul_epu32((__m256i)a, b), odd = (u64)_mm256_mul_epu32((__m256i)((u64)a >> 32), b);
#elif defined(__aarch64__)
  even = vmull_n_u32(vmovn_u64((u64)a), m), odd = vmull_n_u32(vshrn_n_u64((u64)a, 32), m);
#else
  even = ((u64)a & 0xffffffffu) * m, odd = ((u64)a >> 32) * m;
#endif
#if defined(__aarch64__)
  low = vtrn1q_u32((wvec)even, (wvec)odd), high = vtrn2q_u32((wvec)even, (wvec)odd);
#else
  low = (wvec)((even & 0xffffffffu) | odd << 32);
  high = (wvec)(even >> 32 | (odd & ~uint64_t{0xffffffffu}));
#endif
}

// Philox-4x32-10 (Salmon et al., 2011) in every lane: c becomes the four words.
LLMFAST_INLINE void philox(wvec (&c)[4], uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; round++) {
    wvec high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53u, high0, low0);
    multiply_wide(c[2], 0xCD9E8D57u, high1, low1);
    c[0] = high1 ^ c[1] ^ k0, c[1] = low1, c[2] = high0 ^ c[3] ^ k1, c[3] = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

// Scratch that grows and stays with its thread.
struct Scratch {
  char* data = nullptr;
  size_t size = 0;
  void* bytes(size_t n) {
    if (n > size) {
      free(data);
      data = static_cast<char*>(aligned_alloc(64, size = (n + 63) / 64 * 64));
      if (!data) fprintf(stderr, "llmfast: no memory for %zu bytes of a thread's workspace\n", n), abort();
    }
    return data;
  }
  ~Scratch() { free(data); }
};

}  // namespace llmfast::cpu::LLMFAST_ISA
