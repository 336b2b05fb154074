// Tensor views as the kernels read them: 64-bit offsets, broadcast dimensions with stride 0.
#pragma once
#include <type_traits>

#include "attention.h"
#include "ptx.cuh"

namespace llmfast::cuda {

constexpr float kInf = INFINITY;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The same tensor with 4 dimensions, the missing ones in front and broadcast.
inline Tensor four_dimensional(const Tensor& t) {
  Tensor r = t;
  r.dim = 4;
  for (int i = 0; i < 4; i++) {
    const int from = i - (4 - t.dim);
    r.size[i] = from < 0 ? 1 : t.size[from];
    r.stride[i] = from < 0 ? 0 : t.stride[from];
  }
  return r;
}

// 16-byte accesses reach every row: the pointer and all strides but the last.
inline bool has_aligned_rows(const Tensor& t, int bytes) {
  int64_t bits = reinterpret_cast<int64_t>(t.data);
  for (int i = 0; i < 3; i++) bits |= t.stride[i] * bytes;
  return bits % 16 == 0;
}

// Whether scores are more than a positive scale times q k^T within the band.
inline bool is_general(const AttentionSpec& spec, const Extras& extras) {
  return static_cast<float>(spec.scale) <= 0 || spec.softcap != 0 || extras.mask || extras.bias || extras.alibi_slopes;
}

// f of the first of kHeadDims, in ascending order, that holds D and Dv; or why there is none.
template <int... kHeadDims, class F>
const char* with_head_dim(const Tensor& q, const Tensor& v, F&& f) {
  const int64_t D = q.size[3] > v.size[3] ? q.size[3] : v.size[3];
  const char* result = "attention takes head dims up to 256";
  (void)((D <= kHeadDims && (result = f(std::integral_constant<int, kHeadDims>{}), true)) || ...);
  return result;
}

template <class T>
__device__ __forceinline__ T* at(const Tensor& t, int64_t i0, int64_t i1 = 0, int64_t i2 = 0, int64_t i3 = 0) {
  return reinterpret_cast<T*>(t.data) + i0 * t.stride[0] + i1 * t.stride[1] + i2 * t.stride[2] + i3 * t.stride[3];
}

// Element i of float32, bfloat16 or float16 numbers.
__device__ __forceinline__ float float_at(const char* data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kFloat32) return reinterpret_cast<const float*>(data)[i];
  if (dtype == Dtype::kBFloat16) return to_float(reinterpret_cast<const bf16*>(data)[i]);
  return to_float(reinterpret_cast<const half*>(data)[i]);
}

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of a 128-bit access

// The columns of item c of thread t: kVector neighbours where rows are 16-byte aligned, single ones otherwise.
template <class T, int kThreads, bool kAligned>
struct Columns {
  static constexpr int kWidth = kAligned ? kVector<T> : 1;

  __device__ __forceinline__ static int64_t first(int64_t c, int t) { return (c * kThreads + t) * kWidth; }
  __device__ __forceinline__ static void load(float (&x)[kWidth], const T* p) {
    if constexpr (kAligned) {
      const uint4 bits = load_128(p);
      const T* e = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int i = 0; i < kWidth; i++) x[i] = to_float(e[i]);
    } else {
      x[0] = to_float(*p);
    }
  }
  __device__ __forceinline__ static void store(T* p, const float (&x)[kWidth]) {
    if constexpr (kAligned) {
      uint32_t w[4];  // whole words: from single elements nvcc makes eight stores
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if constexpr (kWidth == 4)
          w[i] = reinterpret_cast<const uint32_t&>(x[i]);
        else
          w[i] = pack<T>(x[2 * i], x[2 * i + 1]);
      }
      store_128(p, {w[0], w[1], w[2], w[3]});
    } else {
      *p = from_float<T>(x[0]);
    }
  }
};

// A head's ALiBi slope, 0 where there is none.
__device__ __forceinline__ float slope_of(const Tensor& slopes, int64_t b, int64_t h) {
  return !slopes.data ? 0.f : slopes.dim == 2 ? *at<float>(slopes, b, h) : *at<float>(slopes, h);
}

// The score of query i and key j, which are there, from their product, with every option: scale of any sign, softcap,
// bias, ALiBi, mask. slope(): the head's, asked for where there is one; distance: between key and query; derivative:
// the softcap's.
template <class Slope>
__device__ __forceinline__ float score_of(float product, const AttentionSpec& spec, const Extras& extras, int64_t b,
                                          int64_t h, int i, int j, Slope slope, int distance, float& derivative) {
  const float softcap = spec.softcap;
  const Tensor& bias = extras.bias;
  float y = product * static_cast<float>(spec.scale);
  derivative = 1.f;
  if (softcap != 0.f) {
    const float t = tanhf(y / softcap);
    y = softcap * t, derivative = 1.f - t * t;
  }
  if (bias.data) {
    const int64_t at = b * bias.stride[0] + h * bias.stride[1] + i * bias.stride[2] + j * bias.stride[3];
    y += float_at(bias.data, bias.dtype, at);
  }
  if (extras.alibi_slopes.data) y -= slope() * fabsf(static_cast<float>(distance));
  if (extras.mask.data && !*at<bool>(extras.mask, b, h, i, j)) y = -kInf;
  return y;
}

}  // namespace llmfast::cuda
