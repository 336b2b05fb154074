// The float16 kernels of the backward; a file for each dtype, so that two compile at once.
#include "attention_backward.cuh"

namespace llmfast::cuda {

const char* attention_backward_fp16(const AttentionBackward& problem, void* stream) {
  return dispatch_backward<half>(problem, stream);
}

}  // namespace llmfast::cuda
