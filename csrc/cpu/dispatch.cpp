#include <cstring>
#include <string>

#include "cpu/kernels.h"

namespace llmfast::cpu {
namespace {

struct Entry {
  const Kernels* kernels;
  bool runs;
};

const Entry* entries() {  // best first
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const Entry all[] = {{&kAvx512Bf16, avx512 && __builtin_cpu_supports("avx512bf16")},
                              {&kAvx512, avx512},
                              {&kAvx2, avx2},
                              {&kBaseline, true},
                              {nullptr, false}};
#else
  static const Entry all[] = {{&kBaseline, true}, {nullptr, false}};
#endif
  return all;
}

}  // namespace

const char* supported() {
  static const std::string names = [] {
    std::string s;
    for (const Entry* e = entries(); e->kernels; e++)
      if (e->runs) s += std::string(s.empty() ? "" : " ") + e->kernels->name;
    return s;
  }();
  return names.c_str();
}

const Kernels* select(const char* name) {
  for (const Entry* e = entries(); e->kernels; e++)
    if (e->runs && (!*name || !std::strcmp(name, e->kernels->name))) return e->kernels;
  return nullptr;
}

}  // namespace llmfast::cpu
