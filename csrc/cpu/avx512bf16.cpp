#define LLMFAST_ISA avx512bf16
#define LLMFAST_LANES 16
#define LLMFAST_TABLE kAvx512Bf16
#include "cpu/kernels.inl"
