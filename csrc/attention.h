// What both sides agree on: a strided view of a tensor, and the problem as llmfast/spec.py describes it.
#pragma once
#include <cstdint>

namespace llmfast {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64, kBool, kInt32, kInt64 };

// At most 4 dimensions; sizes and strides in elements. data == nullptr: the tensor is absent.
struct Tensor {
  char* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int dim = 0;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};

  explicit operator bool() const { return data != nullptr; }
};

// Query i attends to key j when -left <= j - i - (Nk - Nq) <= right. The fields of AttentionSpec.
struct AttentionSpec {
  double scale;
  int64_t left, right;
  double softcap, dropout_p;
};

// The fields of Extras.
struct Extras {
  Tensor mask, bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, seqlens_k, page_table;
};

// q (B, H, Nq, D), k (B, Hk, Nk, D), v (B, Hk, Nk, Dv), o (B, H, Nq, Dv), lse (B, H, Nq) or absent.
struct AttentionForward {
  Tensor q, k, v, o, lse;
  AttentionSpec spec;
  Extras extras;
};

// delta = rowsum(o * do) - dlse; dbias and dsinks are absent where not wanted.
struct AttentionBackward {
  Tensor dout, q, k, v, o, lse, delta, dq, dk, dv, dbias, dsinks;
  AttentionSpec spec;
  Extras extras;
};

// x and y (L0, L1, M, N); column j of row i counts when j <= i + offset. y is log_softmax when log is set.
struct Softmax {
  Tensor x, y, mask, bias;
  double scale;
  int64_t offset;
  bool log;
};

// dbias, in the compute type and zero to begin with, is absent where not wanted. Where M, not N, is the contiguous
// dimension of y, dy and dx, there is none.
struct SoftmaxBackward {
  Tensor dy, y, dx, dbias;
  double scale;
  bool log;
};

// x (T, V), target (T,) int64; weight (V,), loss and lse (T,) in the compute type, weight absent where all are 1.
struct CrossEntropy {
  Tensor x, target, weight, loss, lse;
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
};

// dx (T, V) may be x.
struct CrossEntropyBackward {
  Tensor dloss, x, target, weight, lse, dx;
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
};

}  // namespace llmfast
