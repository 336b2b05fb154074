#define LLMFAST_ISA avx512
#define LLMFAST_LANES 16
#include "cpu/simd.h"
#include "cpu/attention_forward.inl"

namespace llmfast::cpu {
const Kernels kAvx512 = {"avx512", avx512::attention_forward};
}
