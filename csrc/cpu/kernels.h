// The kernels of one instruction set. Each csrc/cpu/<isa>.cpp fills one table; dispatch.cpp chooses at run time.
#pragma once
#include "attention.h"

namespace llmfast::cpu {

struct Kernels {
  const char* name;
  void (*attention_forward)(const AttentionForward&);
  void (*attention_decode)(const AttentionForward&);  // without gradient; any number of queries
  double (*peak)(Dtype);
  void (*attention_backward)(const AttentionBackward&);
  void (*rowdot)(const Tensor& o, const Tensor& dout, const Tensor& delta);
  void (*softmax_forward)(const Softmax&);
  void (*softmax_backward)(const SoftmaxBackward&);
  void (*cross_entropy_forward)(const CrossEntropy&);
  void (*cross_entropy_backward)(const CrossEntropyBackward&);
  void (*linear)(const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y);
};

// Weak: a table that setup.py leaves out (LLMFAST_ISAS) has no address.
extern const Kernels kBaseline __attribute__((weak)), kAvx2 __attribute__((weak)), kAvx512 __attribute__((weak)),
    kAvx512Bf16 __attribute__((weak)), kNeon __attribute__((weak));

// The names this machine can run, best first, separated by spaces.
const char* supported();
// The table for a name, or the best one for ""; nullptr if the machine can't run it.
const Kernels* select(const char* name);

}  // namespace llmfast::cpu
