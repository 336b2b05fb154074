// Cross entropy of logits x (T, V) and targets (T,): with c = softcap tanh(x / softcap), lse = log(sum(e^c)),
// loss = (1 - smoothing) w[y] (lse - c[y]) + smoothing / V sum(w (lse - c)) + z_loss lse^2.
//
// One block is one row. Forward reads x once; backward reads x once and writes dx once, dx may be x. Rows up to kCached
// columns are read again from cache, so that p comes from the row's own sum: lse is rounded to its own size, 5 times
// the error on two to five classes. A row whose target is ignore_index has loss 0 and gradient 0 whatever it holds; a
// target outside [0, V) gives NaN for that row.
#pragma once
#include "launch.h"
#include "softmax.cuh"

namespace llmfast::cuda {

__device__ __forceinline__ float capped(float x, float softcap, float& derivative) {
  derivative = 1.f;
  if (softcap == 0.f) return x;
  const float t = tanhf(x / softcap);
  derivative = 1.f - t * t;
  return softcap * t;
}

constexpr int kRowThreads = 256,
              kReductionBytes = 4 * 32 * sizeof(float);  // four reductions, each in memory of its own
constexpr int kCached = 4096;  // columns: 16 KiB of float32, so that 8 blocks, all an SM can hold, fit in its cache

// Over one row c: its maximum, sum(e^(c - m)), and with smoothing sum(w c) and sum(w).
struct RowSums {
  float m = -kInf, l = 0.f, smooth = 0.f, weights = 0.f;
};

template <class T, bool kAligned>
__device__ __forceinline__ RowSums row_sums(const CrossEntropy& a, const T* x, bool smoothing) {
  using C = Columns<T, kRowThreads, kAligned>;
  const float* weight = reinterpret_cast<const float*>(a.weight.data);
  const float softcap = a.softcap;
  RowSums r;
  float derivative;
  for (int64_t c = 0, j; (j = C::first(c, thread_index())) < a.x.size[1]; c++) {
    float s[C::kWidth], m_new = r.m, sum = 0.f;
    C::load(s, x + j);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) {
      s[e] = capped(s[e], softcap, derivative), m_new = fmaxf(m_new, s[e]);
      if (smoothing) {
        const float w = weight ? weight[(j + e) * a.weight.stride[0]] : 1.f;
        r.smooth += w * s[e], r.weights += w;
      }
    }
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) sum += exponential(s[e], m_new);
    r.l = (FAULT == 51 ? r.l : r.l * exponential(r.m, m_new)) + sum, r.m = m_new;
  }
  const float m = reduce<kRowThreads>(r.m, 0, [](float p, float q) { return fmaxf(p, q); });
  const auto add = [](float p, float q) { return p + q; };
  r.l = reduce<kRowThreads>(r.l * exponential(r.m, m), FAULT == 52 ? 0 : 1, add), r.m = m;
  if (smoothing) r.smooth = reduce<kRowThreads>(r.smooth, 2, add), r.weights = reduce<kRowThreads>(r.weights, 3, add);
  return r;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kRowThreads) cross_entropy_fwd(const __grid_constant__ CrossEntropy a) {
  note_shared<kReductionBytes>();
  const int64_t row = block_index(), V = a.x.size[1];
  const T* x = at<const T>(a.x, row);
  const float* weight = reinterpret_cast<const float*>(a.weight.data);
  const int64_t target = *at<int64_t>(a.target, row);
  const RowSums r = row_sums<T, kAligned>(a, x, a.smoothing != 0);
  if (thread_index()) return;
  const float m = r.m == -kInf ? 0.f : r.m, log_l = logf(r.l), lse = m + log_l;
  *at<float>(a.lse, row) = lse;
  float loss = 0.f, derivative;
  if (target != a.ignore_index) {
    const bool inside = target >= 0 && target < V;
    const float w = inside && weight ? weight[target * a.weight.stride[0]] : 1.f;
    const float hit =  // lse - c[y], which loses nothing to the size of m
        inside ? log_l + (m - capped(to_float(x[target]), a.softcap, derivative)) : kInf - kInf;
    loss = static_cast<float>(1 - a.smoothing) * w * hit;
    if (a.z_loss != 0) loss += static_cast<float>(a.z_loss) * lse * lse;
    if (a.smoothing != 0) loss += static_cast<float>(a.smoothing / V) * (r.weights * lse - r.smooth);
    if (!inside) loss = kInf - kInf;
  }
  *at<float>(a.loss, row) = loss;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kRowThreads) cross_entropy_bwd(const __grid_constant__ CrossEntropy a) {
  note_shared<kReductionBytes>();
  using C = Columns<T, kRowThreads, kAligned>;
  const int64_t row = block_index(), V = a.x.size[1];
  const T* x = at<const T>(a.x, row);
  T* dx = at<T>(a.dx, row);
  const float* weight = reinterpret_cast<const float*>(a.weight.data);
  const int64_t target = *at<int64_t>(a.target, row);
  const bool ignored = target == a.ignore_index, inside = target >= 0 && target < V;
  const float dloss = inside ? *at<float>(a.loss, row) : kInf - kInf, lse = *at<float>(a.lse, row);
  const float softcap = a.softcap, smooth = a.smoothing / V, z = 2.f * static_cast<float>(a.z_loss) * lse;
  const float hit =
      static_cast<float>(1 - a.smoothing) * (inside && weight ? weight[target * a.weight.stride[0]] : 1.f);
  const float weights = weight ? *at<float>(a.weight_sum, 0) : V;
  RowSums r{lse, lse == -kInf ? 0.f : 1.f};
  if (V <= kCached) r = row_sums<T, kAligned>(a, x, false);
  const float inverse = 1.f / r.l;
  for (int64_t c = 0, j; (j = C::first(c, thread_index())) < V + (FAULT == 53); c++) {
    float s[C::kWidth], derivative;
    C::load(s, x + j);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) {
      const float p = exponential(capped(s[e], softcap, derivative), r.m) * inverse;
      float d = hit * (j + e == target ? p - 1.f : p) + z * p;  // p - 1 is exact from 1/2 on
      if (a.smoothing != 0) d += smooth * (weights * p - (weight ? weight[(j + e) * a.weight.stride[0]] : 1.f));
      s[e] = ignored ? 0.f : d * derivative * dloss;
    }
    C::store(dx + j, s);
  }
}

}  // namespace llmfast::cuda
