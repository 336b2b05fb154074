#define LLMFAST_ISA neon
#define LLMFAST_LANES 4
#define LLMFAST_TABLE kNeon
#include "cpu/kernels.inl"
