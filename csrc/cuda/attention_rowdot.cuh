// delta = rowsum(o dout) of (B, H, N, Dv) in float32: one read of both. A warp takes 32 / lanes rows, lanes threads a
// row.
#pragma once
#include "launch.h"
#include "views.cuh"

namespace llmfast::cuda {

struct RowDotArgs {
  RowDot p;
  int lanes;  // a power of two to 32
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(128) attention_rowdot(const __grid_constant__ RowDotArgs a) {
  note_shared<0>();
  using C = Columns<T, 32, kAligned>;
  const RowDot& p = a.p;
  const int64_t H = p.o.size[1], N = p.o.size[2], rows = p.o.size[0] * H * N;
  const int64_t row = (block_index() * 128 + thread_index()) / a.lanes, b = row / N / H, h = row / N % H, i = row % N;
  const int Dv = p.o.size[3], lane = thread_index() % a.lanes;
  float sum = 0.f;
  if (row < rows) {
    const T *o = at<const T>(p.o, b, h, i), *dout = at<const T>(p.dout, b, h, i);
    for (int d = lane * C::kWidth; d < Dv + (FAULT == 82); d += a.lanes * C::kWidth) {
      float x[C::kWidth], y[C::kWidth];
      C::load(x, o + d), C::load(y, dout + d);
#pragma unroll
      for (int e = 0; e < C::kWidth; e++) sum += x[e] * y[e];
    }
  }
  for (int lanes = a.lanes / (FAULT == 81 ? 4 : 2); lanes; lanes /= 2) sum += shuffle_xor(sum, lanes);
  if (row < rows && lane == 0) *at<float>(p.delta, b, h, i) = sum;
}

}  // namespace llmfast::cuda
