// Chooses the softmax kernels for a row length and starts them.
#include "launch.h"
#include "softmax.cuh"

namespace llmfast::cuda {
namespace {

// Blocks that hold a row of N, of which one holds `columns`; 0 where no cluster does.
int cluster_for(int64_t N, int64_t columns) {
  for (int blocks = 2; blocks <= kClusterBlocks; blocks *= 2)
    if (N <= blocks * columns) return blocks;
  return 0;
}

template <class T, bool kPlain>
const char* run(const Softmax& a, void* stream) {
  const int64_t N = a.x.size[3], rows = N ? a.x.size[0] * a.x.size[1] * a.x.size[2] : 0;
  const int64_t shared_rows = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  if (N <= 256) return launch(softmax_rows<T, 32, 8, kPlain>, shared_rows, 32 * kRowsPerBlock, 0, stream, a);
  if (N <= 1024) return launch(softmax_rows<T, 32, 32, kPlain>, shared_rows, 32 * kRowsPerBlock, 0, stream, a);
  if (N <= 8192) return launch(softmax_rows<T, 256, 32, kPlain>, rows, 256, kRowBytes, stream, a);
  constexpr int kItems = kPlain ? 32 : 16;  // addresses of mask and bias take the place of 16 values
  if (N <= 1024 * kItems) return launch(softmax_rows<T, 1024, kItems, kPlain>, rows, 1024, kRowBytes, stream, a);
  const int blocks = cluster_for(N, 1024 * kItems);
  if (blocks && has_clusters(softmax_cluster_rows<T, kItems, kPlain>, kClusterStart))
    return launch(softmax_cluster_rows<T, kItems, kPlain>, rows * blocks, 1024, kClusterStart, stream, a, blocks);
  return launch(softmax_long_rows<T, kPlain>, rows, 1024, kRowBytes, stream, a);
}

template <class T>
const char* run(const Softmax& a, void* stream) {
  const bool plain = !a.mask && !a.bias && a.x.size[3] % kVector<T> == 0 && has_aligned_rows(a.x, sizeof(T)) &&
                     has_aligned_rows(a.y, sizeof(T));
  return plain ? run<T, true>(a, stream) : run<T, false>(a, stream);
}

template <class T, bool kAligned>
const char* run_backward(const SoftmaxBackward& a, void* stream) {
  const int64_t N = a.y.size[3], rows = N ? a.y.size[0] * a.y.size[1] * a.y.size[2] : 0;
  const int64_t shared_rows = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  if (N <= 256) return launch(softmax_bwd_rows<T, 32, 8, kAligned>, shared_rows, 32 * kRowsPerBlock, 0, stream, a);
  if (N <= 512) return launch(softmax_bwd_rows<T, 32, 16, kAligned>, shared_rows, 32 * kRowsPerBlock, 0, stream, a);
  if (N <= 4096) return launch(softmax_bwd_rows<T, 256, 16, kAligned>, rows, 256, kRowBytes, stream, a);
  constexpr int kItems = kAligned ? 16 : 8;  // of y and of dy; single columns need as many addresses as values
  if (N <= 1024 * kItems) return launch(softmax_bwd_rows<T, 1024, kItems, kAligned>, rows, 1024, kRowBytes, stream, a);
  if constexpr (kAligned) {
    const int blocks = cluster_for(N, 1024 * kClusterItems);
    if (blocks && has_clusters(softmax_bwd_cluster_rows<T>, kClusterBytes<T>))
      return launch(softmax_bwd_cluster_rows<T>, rows * blocks, 1024, kClusterBytes<T>, stream, a, blocks);
  }
  return launch(softmax_bwd_long_rows<T, kAligned>, rows, 1024, kRowBytes, stream, a);
}

template <class T>
const char* run_backward(const SoftmaxBackward& a, void* stream) {
  const bool aligned = a.y.size[3] % kVector<T> == 0 && has_aligned_rows(a.dy, sizeof(T)) &&
                       has_aligned_rows(a.y, sizeof(T)) && has_aligned_rows(a.dx, sizeof(T));
  return aligned ? run_backward<T, true>(a, stream) : run_backward<T, false>(a, stream);
}

}  // namespace

const char* softmax_forward(const Softmax& problem, void* stream) {
  Softmax a = problem;
  a.mask = four_dimensional(problem.mask), a.bias = four_dimensional(problem.bias);
  switch (a.x.dtype) {
    case Dtype::kFloat32:
      return run<float>(a, stream);
    case Dtype::kBFloat16:
      return run<bf16>(a, stream);
    case Dtype::kFloat16:
      return run<half>(a, stream);
    default:
      return "softmax takes float32, bfloat16 or float16";
  }
}

const char* softmax_backward(const SoftmaxBackward& a, void* stream) {
  switch (a.y.dtype) {
    case Dtype::kFloat32:
      return run_backward<float>(a, stream);
    case Dtype::kBFloat16:
      return run_backward<bf16>(a, stream);
    case Dtype::kFloat16:
      return run_backward<half>(a, stream);
    default:
      return "softmax takes float32, bfloat16 or float16";
  }
}

const char* unavailable() { return device_problem(); }

}  // namespace llmfast::cuda
