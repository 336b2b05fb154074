#define LLMFAST_ISA avx512bf16
#define LLMFAST_LANES 16
#include "cpu/simd.h"
#include "cpu/attention_forward.inl"

namespace llmfast::cpu {
const Kernels kAvx512Bf16 = {"avx512bf16", avx512bf16::attention_forward};
}
