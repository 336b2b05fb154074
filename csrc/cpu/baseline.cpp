#define LLMFAST_ISA baseline
#define LLMFAST_LANES 4
#define LLMFAST_TABLE kBaseline
#include "cpu/kernels.inl"
