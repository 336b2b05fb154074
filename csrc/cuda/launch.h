// The launchers, in plain C++ types. Each returns nullptr, or the error in words; sizes and dtypes are checked by
// backends/cuda.py.
#pragma once
#include "attention.h"

namespace llmfast::cuda {

// q, k, v float16 or bfloat16 with 16-byte aligned rows, D and Dv at most 256; sinks float32; o and lse are written
// where a sequence has a row.
const char* attention_forward(const AttentionForward& problem, void* stream);

// As attention_forward, for a few queries against the keys that seqlens_k counts in a cache or in pages (page_table).
// parts (splits, B H Nq, Dv rounded up to a multiple of 8, at least 8) and sums (splits, B H Nq, 2) float32 are room
// for as many splits of the keys; counters int32, one for each 16 rows of a key head, are zero and stay so. All three
// may be absent: one split.
struct AttentionDecode {
  AttentionForward forward;
  Tensor parts, sums, counters;
};
const char* attention_decode(const AttentionDecode& problem, void* stream);

// delta float32 from o and dout of one dtype, float16 or bfloat16, the last dimension of both contiguous.
struct RowDot {
  Tensor o, dout, delta;
};
const char* attention_rowdot(const RowDot& problem, void* stream);

// dq, dk and dv from dout, q, k, v (16-byte aligned rows), lse and delta float32; dbias, dsinks and o are not looked
// at.
const char* attention_backward(const AttentionBackward& problem, void* stream);

// float32, float16 or bfloat16, any sizes, the last dimension of x and y contiguous; y may be x.
const char* softmax_forward(const Softmax& problem, void* stream);

// dx from dy and y of one dtype, the last dimension of all three contiguous; dbias is not looked at.
const char* softmax_backward(const SoftmaxBackward& problem, void* stream);

// x (T, V) float32, float16 or bfloat16 with contiguous rows, target int64, weight float32 or absent. Without dx: loss
// and lse (T,) float32 are written; with dx: they are read, loss being the gradient of each row's loss, and dx is
// written from weight_sum too, the sum of weight.
struct CrossEntropy {
  Tensor x, target, weight, weight_sum, loss, lse, dx;
  int64_t ignore_index;
  double smoothing, z_loss, softcap;
};
const char* cross_entropy(const CrossEntropy& problem, void* stream);

// nullptr, or why kernels can't run on this machine.
const char* unavailable();

}  // namespace llmfast::cuda
