// What one core reaches: multiply-adds on registers alone, the roof that the benchmarks measure against.
namespace llmfast::cpu::LLMFAST_ISA {

#if defined(__aarch64__)
constexpr int kChains = 24;  // Neoverse V and Apple's cores begin four a cycle, which take four cycles
#else
constexpr int kChains = 12;  // hide a latency of 4 to 6 at two a cycle
#endif

// 2^18 rounds of one step on each chain: seconds of this thread's CPU time, so another process on the core doesn't
// count.
template <class Step>
LLMFAST_INLINE double chains(Step&& step) {
  auto now = [] {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  vec acc[kChains] = {};
  const double start = now();
  for (int i = 0; i < 1 << 18; i++) {
    LLMFAST_UNROLL
    for (int c = 0; c < kChains; c++) {
      acc[c] = step(acc[c]);
#if defined(__AVX512F__)
      asm volatile("" : "+v"(acc[c]));
#elif defined(__x86_64__)
      asm volatile("" : "+x"(acc[c]));
#elif defined(__aarch64__)
      asm volatile("" : "+w"(acc[c]));
#endif
    }
  }
  return now() - start;
}

// FLOP/s in a dtype, the best of 10. bfloat16 counts the dot product of pairs where the instruction set has it; it and
// float16 run at float32's rate where it doesn't.
inline double peak(Dtype dtype) {
  double best = 0;
  for (int attempt = 0; attempt < 10; attempt++) {
    double flops = double{kChains} * (1 << 18) * kLanes * (dtype == Dtype::kFloat64 ? 1 : 2);
#ifdef __AVX512BF16__
    if (dtype == Dtype::kBFloat16) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);
      best = max(best, 2 * flops / chains([&](vec a) __attribute__((always_inline)) {
                         return (vec)_mm512_dpbf16_ps((__m512)a, x, x);
                       }));
      continue;
    }
#endif
    const vec x = splat(0.5f);
    best = max(best, flops / chains([&](vec a) __attribute__((always_inline)) { return a * x + x; }));
  }
  return best;
}

}  // namespace llmfast::cpu::LLMFAST_ISA
