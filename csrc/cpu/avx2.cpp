#define LLMFAST_ISA avx2
#define LLMFAST_LANES 8
#include "cpu/simd.h"
#include "cpu/attention_forward.inl"

namespace llmfast::cpu {
const Kernels kAvx2 = {"avx2", avx2::attention_forward};
}
