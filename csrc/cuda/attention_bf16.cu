// The bfloat16 kernels, and the entry of both dtypes.
#include "attention_launch.cuh"
#include "launch.h"

namespace llmfast::cuda {

const char* attention_forward_bf16(const AttentionForward& problem, void* stream) {
  return dispatch_head_dim<bf16>(problem, stream);
}

const char* attention_forward(const AttentionForward& problem, void* stream) {
  switch (problem.q.dtype) {
    case Dtype::kFloat16:
      return attention_forward_fp16(problem, stream);
    case Dtype::kBFloat16:
      return attention_forward_bf16(problem, stream);
    default:
      return "attention takes float16 or bfloat16";
  }
}

}  // namespace llmfast::cuda
