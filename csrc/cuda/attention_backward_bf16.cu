// The bfloat16 kernels of the backward, and the entry of both dtypes.
#include "attention_backward.cuh"
#include "launch.h"

namespace llmfast::cuda {

const char* attention_backward(const AttentionBackward& problem, void* stream) {
  switch (problem.q.dtype) {
    case Dtype::kFloat16:
      return attention_backward_fp16(problem, stream);
    case Dtype::kBFloat16:
      return dispatch_backward<bf16>(problem, stream);
    default:
      return "attention takes float16 or bfloat16";
  }
}

}  // namespace llmfast::cuda
