// The kernels of one instruction set. Each csrc/cpu/<isa>.cpp fills one table; dispatch.cpp chooses at run time.
#pragma once
#include "attention.h"

namespace llmfast::cpu {

struct Kernels {
  const char* name;
  void (*attention_forward)(const AttentionForward&);
  double (*peak)(Dtype);
  void (*attention_backward)(const AttentionBackward&);
  void (*rowdot)(const Tensor& o, const Tensor& dout, const Tensor& delta);
  void (*softmax_forward)(const Softmax&);
  void (*softmax_backward)(const SoftmaxBackward&);
};

extern const Kernels kBaseline, kAvx2, kAvx512, kAvx512Bf16;

// The names this machine can run, best first, separated by spaces.
const char* supported();
// The table for a name, or the best one for ""; nullptr if the machine can't run it.
const Kernels* select(const char* name);

}  // namespace llmfast::cpu
