#define LLMFAST_ISA avx2
#define LLMFAST_LANES 8
#define LLMFAST_TABLE kAvx2
#include "cpu/kernels.inl"
