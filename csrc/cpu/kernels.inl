// Everything one instruction set has, gathered in its table.
#include "cpu/simd.h"

#include "cpu/sequence.inl"

#include "cpu/attention_forward.inl"
#include "cpu/attention_decode.inl"
#include "cpu/attention_backward_block.inl"
#include "cpu/attention_backward.inl"
#include "cpu/softmax.inl"
#include "cpu/softmax_backward.inl"
#include "cpu/cross_entropy.inl"
#include "cpu/linear.inl"
#include "cpu/peak.inl"

#define LLMFAST_NAME_(x) #x
#define LLMFAST_NAME(x) LLMFAST_NAME_(x)

namespace llmfast::cpu {
const Kernels LLMFAST_TABLE = {
    LLMFAST_NAME(LLMFAST_ISA),
    LLMFAST_ISA::attention_forward,
    LLMFAST_ISA::attention_decode,
    LLMFAST_ISA::peak,
    LLMFAST_ISA::attention_backward,
    LLMFAST_ISA::rowdot,
    LLMFAST_ISA::softmax_forward,
    LLMFAST_ISA::softmax_backward,
    LLMFAST_ISA::cross_entropy_forward,
    LLMFAST_ISA::cross_entropy_backward,
    LLMFAST_ISA::linear,
};
}  // namespace llmfast::cpu
