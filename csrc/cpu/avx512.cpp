#define LLMFAST_ISA avx512
#define LLMFAST_LANES 16
#define LLMFAST_TABLE kAvx512
#include "cpu/kernels.inl"
