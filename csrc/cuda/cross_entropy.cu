// Starts the cross entropy kernels.
#include "cross_entropy.cuh"

namespace llmfast::cuda {
namespace {

template <class T>
const char* run(const CrossEntropy& a, void* stream) {
  const auto whole = [](const Tensor& t) {
    return (reinterpret_cast<int64_t>(t.data) | t.stride[0] * static_cast<int64_t>(sizeof(T))) % 16 == 0;
  };
  const bool aligned = a.x.size[1] % kVector<T> == 0 && whole(a.x) && whole(a.dx);
  const auto kernel = a.dx ? (aligned ? cross_entropy_bwd<T, true> : cross_entropy_bwd<T, false>)
                           : (aligned ? cross_entropy_fwd<T, true> : cross_entropy_fwd<T, false>);
  return launch(kernel, a.x.size[0], kRowThreads, kReductionBytes, stream, a);
}

}  // namespace

const char* cross_entropy(const CrossEntropy& a, void* stream) {
  switch (a.x.dtype) {
    case Dtype::kFloat32:
      return run<float>(a, stream);
    case Dtype::kBFloat16:
      return run<bf16>(a, stream);
    case Dtype::kFloat16:
      return run<half>(a, stream);
    default:
      return "cross entropy takes float32, bfloat16 or float16";
  }
}

}  // namespace llmfast::cuda
