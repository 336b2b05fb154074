#define LLMFAST_ISA baseline
#define LLMFAST_LANES 4
#include "cpu/simd.h"
#include "cpu/attention_forward.inl"

namespace llmfast::cpu {
const Kernels kBaseline = {"baseline", baseline::attention_forward};
}
