#include <cstring>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace llmfast::cpu {
namespace {

const std::vector<const Kernels*>& tables() {  // those this build has and this machine runs, best first
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> v;
    auto add = [&v](const Kernels* k, bool runs) {
      if (k && runs) v.push_back(k);
    };
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    add(&kAvx512Bf16, avx512 && __builtin_cpu_supports("avx512bf16"));
    add(&kAvx512, avx512);
    add(&kAvx2, avx2);
#endif
    add(&kNeon, true);  // built for aarch64 alone, which always has it
    add(&kBaseline, true);
    return v;
  }();
  return found;
}

}  // namespace

const char* supported() {
  static const std::string names = [] {
    std::string s;
    for (const Kernels* k : tables()) s += std::string(s.empty() ? "" : " ") + k->name;
    return s;
  }();
  return names.c_str();
}

const Kernels* select(const char* name) {
  for (const Kernels* k : tables())
    if (!*name || !std::strcmp(name, k->name)) return k;
  return nullptr;
}

}  // namespace llmfast::cpu
