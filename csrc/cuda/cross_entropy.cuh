// Cross entropy of logits x (T, V) and targets (T,): with c = softcap tanh(x / softcap), lse = log(sum(e^c)),
// loss = (1 - smoothing) w[y] (lse - c[y]) + smoothing / V sum(w (lse - c)) + z_loss lse^2.
//
// One block is one row. Forward reads x once; backward reads x once and writes dx once, dx may be x. A row whose target
// is ignore_index has loss 0 and gradient 0 whatever it holds; a target outside [0, V) gives NaN for that row.
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

constexpr int kRowThreads = 256;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kRowThreads) cross_entropy_fwd(const __grid_constant__ CrossEntropy a) {
  using C = Columns<T, kRowThreads, kAligned>;
  const int64_t row = block_index(), V = a.x.size[1];
  const T* x = at<const T>(a.x, row);
  const float* weight = reinterpret_cast<const float*>(a.weight.data);
  const int64_t target = *at<int64_t>(a.target, row);
  const float softcap = a.softcap;
  float m = -kInf, l = 0.f, smooth = 0.f, weights = 0.f, derivative;
  for (int64_t c = 0, j; (j = C::first(c, thread_index())) < V; c++) {
    float s[C::kWidth], m_new = m, sum = 0.f;
    C::load(s, x + j);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) {
      s[e] = capped(s[e], softcap, derivative), m_new = fmaxf(m_new, s[e]);
      if (a.smoothing != 0) {
        const float w = weight ? weight[(j + e) * a.weight.stride[0]] : 1.f;
        smooth += w * s[e], weights += w;
      }
    }
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) sum += exponential(s[e], m_new);
    l = (FAULT == 51 ? l : l * exponential(m, m_new)) + sum, m = m_new;
  }
  const float m_row = reduce<kRowThreads>(m, 0, [](float p, float q) { return fmaxf(p, q); });
  const auto add = [](float p, float q) { return p + q; };
  l = reduce<kRowThreads>(l * exponential(m, m_row), FAULT == 52 ? 0 : 1, add);
  if (a.smoothing != 0) smooth = reduce<kRowThreads>(smooth, 2, add), weights = reduce<kRowThreads>(weights, 3, add);
  if (thread_index()) return;
  const float lse = (m_row == -kInf ? 0.f : m_row) + logf(l);
  *at<float>(a.lse, row) = lse;
  float loss = 0.f;
  if (target != a.ignore_index) {
    const bool inside = target >= 0 && target < V;
    const float w = inside && weight ? weight[target * a.weight.stride[0]] : 1.f;
    const float hit = inside ? lse - capped(to_float(x[target]), softcap, derivative) : kInf - kInf;
    loss = static_cast<float>(1 - a.smoothing) * w * hit + static_cast<float>(a.z_loss) * lse * lse;
    if (a.smoothing != 0) loss += static_cast<float>(a.smoothing / V) * (weights * lse - smooth);
    if (!inside) loss = kInf - kInf;
  }
  *at<float>(a.loss, row) = loss;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kRowThreads) cross_entropy_bwd(const __grid_constant__ CrossEntropy a) {
  using C = Columns<T, kRowThreads, kAligned>;
  const int64_t row = block_index(), V = a.x.size[1];
  const T* x = at<const T>(a.x, row);
  T* dx = at<T>(a.dx, row);
  const float* weight = reinterpret_cast<const float*>(a.weight.data);
  const int64_t target = *at<int64_t>(a.target, row);
  const bool ignored = target == a.ignore_index, inside = target >= 0 && target < V;
  const float dloss = inside ? *at<float>(a.loss, row) : kInf - kInf, lse = *at<float>(a.lse, row);
  const float softcap = a.softcap, smooth = a.smoothing / V;
  const float hit =
      static_cast<float>(1 - a.smoothing) * (inside && weight ? weight[target * a.weight.stride[0]] : 1.f);
  const float all =
      hit + smooth * (weight ? *at<float>(a.weight_sum, 0) : V) + 2.f * static_cast<float>(a.z_loss) * lse;
  for (int64_t c = 0, j; (j = C::first(c, thread_index())) < V + (FAULT == 53); c++) {
    float s[C::kWidth], derivative;
    C::load(s, x + j);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) {
      const float y = capped(s[e], softcap, derivative);
      float d =
          all * expf(y - lse) - (a.smoothing != 0 && weight ? smooth * weight[(j + e) * a.weight.stride[0]] : smooth);
      if (j + e == target) d -= hit;
      s[e] = ignored ? 0.f : d * derivative * dloss;
    }
    C::store(dx + j, s);
  }
}

}  // namespace llmfast::cuda
