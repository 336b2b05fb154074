// The float16 kernels; a file for each dtype, so that two compile at once.
#include "attention_launch.cuh"

namespace llmfast::cuda {

const char* attention_forward_fp16(const AttentionForward& problem, void* stream) {
  return dispatch_head_dim<half>(problem, stream);
}

}  // namespace llmfast::cuda
