// softmax and log_softmax of s = scale x + bias over the last dimension of (L0, L1, M, N).
//
// A row goes through a buffer of kChunk numbers in the compute type, which stays in L1: fill it with s and its maximum,
// exp and sum, write. A longer row is read twice: chunk by chunk for the running maximum and sum, then for the result.
// Without bias and mask a row's sum is taken against a number near the largest so far: softmax reads a row once, as
// each chunk's exponentials wait in a buffer for the sum; and of short rows a group is taken at once, as a single one
// mostly waits for its own maximum and sum. Where M is the contiguous dimension, a lane is a row; with bias, mask or
// causal kLanes rows are transposed into the buffer and back.
namespace llmfast::cpu::LLMFAST_ISA {
namespace softmax_rows {

constexpr int64_t kChunk = 256 * kLanes;  // 64 numbers of float32 in a sum of 4 vectors, whatever the lanes
constexpr int64_t kKept = 1 << 20;        // exponentials that wait for the sum: 4 MiB, less than an L3
constexpr int64_t kTall = 1024;           // rows of exponentials that wait for the columns' sums: 256 KiB
constexpr int64_t kStream = 16 << 20;     // bytes of a result that no cache holds beside x: written past the caches

// The indices of task t of (.., M1, M2), counted on from a thread's first: a division takes as long as a short row.
struct Indices {
  int64_t M1, M2, at[3] = {-1, 0, 0};

  void go_to(int64_t t) {
    if (at[0] < 0) {
      at[0] = t / (M1 * M2), at[1] = t / M2 % M1, at[2] = t % M2;
    } else if (++at[2] == M2) {
      at[2] = 0;
      if (++at[1] == M1) at[1] = 0, at[0]++;
    }
  }
};

template <class T>
T* at(const Tensor& t, int64_t a, int64_t b, int64_t i) {
  return reinterpret_cast<T*>(t.data) + a * t.stride[0] + b * t.stride[1] + i * t.stride[2];
}

template <class C>
LLMFAST_INLINE vec_of<C> exponential(vec_of<C> x) {
  return exp2(x, static_cast<C>(1.4426950408889634));
}
// The sum of the lanes in double: each rounding of it errs in every element of the row.
template <class V>
LLMFAST_INLINE double total(V x) {
  constexpr int L = sizeof(V) / sizeof(x[0]);
  alignas(64) double t[L];
  LLMFAST_UNROLL
  for (int i = 0; i < L; i++) t[i] = x[i];
  LLMFAST_UNROLL
  for (int half = L / 2; half; half /= 2) LLMFAST_UNROLL
  for (int i = 0; i < half; i++) t[i] += t[i + half];
  return t[0];
}

#if LLMFAST_LANES == 16  // in registers: a row of 512 floats has only 32 vectors
LLMFAST_INLINE double total(vec x) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(high)));
}
#elif defined(__aarch64__)
LLMFAST_INLINE double total(vec x) {
  return vaddvq_f64(vaddq_f64(vcvt_f64_f32(vget_low_f32(x)), vcvt_high_f64_f32(x)));
}
#endif

// The sum of four vectors' lanes in double.
template <class V>
LLMFAST_INLINE double total(const V (&x)[4]) {
  return (total(x[0]) + total(x[1])) + (total(x[2]) + total(x[3]));
}
#if LLMFAST_LANES == 16
LLMFAST_INLINE double total(const vec (&x)[4]) {
  __m512d sum = _mm512_setzero_pd();
  LLMFAST_UNROLL
  for (int k = 0; k < 4; k++) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x[k]), 1));
    sum = _mm512_add_pd(sum, _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x[k])), _mm512_cvtps_pd(high)));
  }
  return _mm512_reduce_add_pd(sum);
}
#endif

// n numbers of x, scaled, to buffer, with what bias and mask do to them, and -inf up to 4 whole vectors: their
// maximum, which loses a NaN (the sum keeps it)
template <class T, class C>
LLMFAST_INLINE C fill(const Softmax& p, const T* x, int64_t a, int64_t b, int64_t i, int64_t j, int64_t n, bool widened,
                      C* buffer, C* other) {
  constexpr int L = kLanesOf<C>;
  using V = vec_of<C>;
  const C scale = static_cast<C>(p.scale);
  V m0 = splat(-kInfOf<C>), m1 = m0, m2 = m0, m3 = m0;
  int64_t e = 0;
  const bool plain = !p.bias && !p.mask;
  if (!widened) {
    for (; e + 4 * L <= n; e += 4 * L) {
      V y0 = loadu(x + e) * scale, y1 = loadu(x + e + L) * scale, y2 = loadu(x + e + 2 * L) * scale,
        y3 = loadu(x + e + 3 * L) * scale;
      store(buffer + e, y0), store(buffer + e + L, y1), store(buffer + e + 2 * L, y2), store(buffer + e + 3 * L, y3);
      m0 = max(m0, y0), m1 = max(m1, y1), m2 = max(m2, y2), m3 = max(m3, y3);
    }
    for (; e + L <= n; e += L) {
      V y = loadu(x + e) * scale;
      store(buffer + e, y), m0 = max(m0, y);
    }
    if (e < n) store(buffer + e, load_part(x + e, n - e) * scale);
  }
  for (int64_t t = n; t < (n + 4 * L - 1) / (4 * L) * (4 * L); t++) buffer[t] = -kInfOf<C>;
  if (plain && !widened) {
    if (e < n) m0 = max(m0, load(buffer + e));
    return greatest(max(max(m0, m1), max(m2, m3)));
  }
  auto start = [&](const Tensor& t) { return a * t.stride[0] + b * t.stride[1] + i * t.stride[2] + j * t.stride[3]; };
  if (p.bias) {
    attention_bwd::row_of(p.bias, start(p.bias), n, other);
    for (e = 0; e < n; e += L) store(buffer + e, load(buffer + e) + load(other + e));
  }
  if (p.mask) {
    attention_bwd::row_of(p.mask, start(p.mask), n, other);
    for (e = 0; e < n; e += L) store(buffer + e, load(other + e) == 0 ? splat(-kInfOf<C>) : load(buffer + e));
  }
  for (int64_t t = n; t < (n + L - 1) / L * L; t++) buffer[t] = -kInfOf<C>;
  m0 = splat(-kInfOf<C>);
  for (e = 0; e < n; e += L) m0 = max(m0, load(buffer + e));
  return greatest(m0);
}

// sum of exp(buffer - m), kept in the buffer where kKeep
template <bool kKeep, class C>
LLMFAST_INLINE C sum_exp(C* buffer, int64_t n, C m) {
  constexpr int L = kLanesOf<C>;
  vec_of<C> sums[4] = {};
  for (int64_t e = 0; e < n; e += 4 * L) LLMFAST_UNROLL
  for (int k = 0; k < 4; k++) {
    vec_of<C> y = exponential<C>(load(buffer + e + k * L) - m);
    sums[k] += y;
    if constexpr (kKeep) store(buffer + e + k * L, y);
  }
  return static_cast<C>(total((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

// y = f(x), past the caches where kPast; kMixed: x in lanes as load_two<true> leaves them
template <bool kPast = false, bool kMixed = false, class S, class T, class F>
LLMFAST_INLINE void write(const S* x, int64_t n, T* y, F&& f) {
  constexpr int L = kLanesOf<compute<S>>;
  int64_t e = 0;
  if constexpr (kPast) {
    const int64_t head = min<int64_t>(n, (64 - reinterpret_cast<uintptr_t>(y) % 64) % 64 / sizeof(T));
    for (; e + L <= head; e += L) storeu(y + e, f(loadu(x + e)));
    if (e < head) store_part(y + e, f(load_part(x + e, head - e)), head - e);
    for (e = head; e + 4 * L <= n; e += 4 * L) LLMFAST_UNROLL
    for (int k = 0; k < 4; k++) stream(y + e + k * L, f(loadu(x + e + k * L)));
  } else if constexpr (kMixed) {
    for (; e + 4 * L <= n; e += 4 * L) LLMFAST_UNROLL
    for (int k = 0; k < 4; k += 2)
      store_two<true>(y + e + k * L, f(loadu(x + e + k * L)), f(loadu(x + e + (k + 1) * L)));
  }
  for (; e + 2 * L <= n; e += 2 * L) storeu(y + e, f(loadu(x + e))), storeu(y + e + L, f(loadu(x + e + L)));
  for (; e + L <= n; e += L) storeu(y + e, f(loadu(x + e)));
  if (e < n) store_part(y + e, f(load_part(x + e, n - e)), n - e);
}

template <class C>
LLMFAST_INLINE C finite(C m) {
  return m == -kInfOf<C> ? C(0) : m;
}

// A row that fits in the buffer, already filled: the result in the buffer's place.
template <class T, class C>
LLMFAST_INLINE void finish(bool log_of, C* buffer, int64_t n, C m, T* y) {
  m = finite(m);
  if (log_of) {
    const C l = sum_exp<false>(buffer, n, m), lse = l == 0 ? C(0) : log(l);
    write(buffer, n, y, [&](auto v) { return v - m - lse; });
  } else {
    const C l = sum_exp<true>(buffer, n, m), inverse = l == 0 ? C(0) : 1 / l;
    write(buffer, n, y, [&](auto v) {
      auto q = v * inverse;
      return q + (v - q * l) * inverse;  // the quotient, correctly rounded but for rare ties
    });
  }
}

// What plain_row counts in: 2^x in float, which costs a step less; else e^x.
template <class C>
constexpr bool kBase2 = std::is_same_v<C, float>;
template <class C>
LLMFAST_INLINE C power(C x) {
  return kBase2<C> ? static_cast<C>(__builtin_exp2f(static_cast<float>(x))) : exp(x);
}

// What a number is multiplied by to be counted so.
template <class C>
LLMFAST_INLINE C unit(double scale) {
  return static_cast<C>(kBase2<C> ? scale * 1.4426950408889634 : scale);
}

// Numbers that are further from what they are counted against leave the range of kRound, or overflow.
template <class C>
constexpr C kFar = kBase2<C> ? C(4e6) : C(1e30);

// 2^(x c - base) or, in double, e^(x c - base) of the numbers x of a row, 1 at base itself where kLog. In float base is
// an integer, so that x c is rounded once, when all but a fraction is gone from it.
template <class T, bool kLog>
struct Against {
  using C = compute<T>;
  using V = vec_of<C>;
  C c, base = 0, shift = 0;  // shift is kRound - base

  // Counts against a number near base + by; false where that is too far away.
  __attribute__((always_inline)) bool rise(C by) {
    if (!(by > -kFar<C> && by < kFar<C>)) return false;
    if constexpr (kBase2<C>) {
      base += by + kRound<C> - kRound<C>, shift = kRound<C> - base;
    } else {
      base += by;
    }
    return base > -kFar<C> && base < kFar<C>;
  }
  // The power, and x c - base or, in float, an integer near it, moved by kRound.
  __attribute__((always_inline)) V operator()(V x, V& z) const {
    if constexpr (kBase2<C>) {
      z = x * c + shift;  // rounds to an integer in the low bits
      const V t = max(splat(kRound<C> - 127), z), f = max(splat(C(-1)), x * c - (t - shift));
      return (sizeof(T) > 2 ? exp2_fraction6(f) : kLog ? exp2_fraction(f) : exp2_fraction4(f)) * exponent(t);
    } else {
      z = x * c - base;
      return exponential<C>(z);
    }
  }
  // What operator() left, as a number again.
  static C distance(C z) { return kBase2<C> ? z - kRound<C> : z; }
};

// 2^z or, in double and where kLog, e^z for z <= 0.
template <class T, bool kLog>
LLMFAST_INLINE vec_of<compute<T>> weight(vec_of<compute<T>> z) {
  using C = compute<T>;
  if constexpr (sizeof(T) == 2) {
    return kLog ? exp2(z, kLog2e) : exp2_coarse(z, 1.f);
  } else if constexpr (kBase2<C>) {
    return exp2_by(z, kLog ? kLog2e : 1, [](vec f) __attribute__((always_inline)) { return exp2_fraction6(f); });
  } else {
    return exponential<C>(z);
  }
}

// A logarithm of at most 1, which rounding might lift above 0; NaN passes.
template <class V>
LLMFAST_INLINE V negative(V x) {
  return min(V{}, x);
}

constexpr int kShortVectors = 8;  // of a row of which kLanes rows of exponentials are at most 8 KiB

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // kept: only what was stored is loaded
// The softmax or, where kLog, its logarithm of a few rows, at most kLanes, so many elements apart, of at most 8 vectors
// of plain numbers, each against its largest; false as in plain_row. Maxima and sums of all rows are on their way at
// once.
template <class T, bool kLog>
bool short_rows(const T* x, int64_t x_step, T* y, int64_t y_step, int64_t rows, int64_t n, double scale) {
  using C = compute<T>;
  using V = vec_of<C>;
  constexpr int L = kLanesOf<C>;
  const C c = kLog ? static_cast<C>(scale) : unit<C>(scale);
  const V none = splat(-kInfOf<C>);
  alignas(64) C kept[L * kShortVectors * L];
  C largest[L], l[L];
  auto each = [&](auto&& f) __attribute__((always_inline)) {
    LLMFAST_UNROLL
    for (int k = 0; k < kShortVectors; k++)
      if (k * L < n) f(k, n - k * L);
  };
  auto scaled = [&](const T* from, int64_t left, C base) __attribute__((always_inline)) {
    if (left >= L) return loadu(from) * c - base;
    return iota<C>() < static_cast<C>(left) ? load_part(from, left) * c - base : none;
  };
  bool countable = true;
  for (int64_t r = 0; r < rows; r++) {
    V most = none;
    each([&](int k, int64_t left)
             __attribute__((always_inline)) { most = max(most, scaled(x + r * x_step + k * L, left, C(0))); });
    largest[r] = greatest(most);
    if (!(largest[r] > -kFar<C> && largest[r] < kFar<C>)) countable = false;
  }
  if (!countable) return false;
  for (int64_t r = 0; r < rows; r++) {
    V sums[4] = {};
    each([&](int k, int64_t left) __attribute__((always_inline)) {
      const V z = scaled(x + r * x_step + k * L, left, largest[r]), v = weight<T, kLog>(z);
      sums[k % 4] += v;
      store(kept + (r * kShortVectors + k) * L, kLog ? z : v);
    });
    l[r] = static_cast<C>(n <= L ? total(sums[0]) : total((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
  for (int64_t r = 0; r < rows; r++) {
    const C by = kLog ? log(l[r]) : 1 / l[r];
    each([&](int k, int64_t left) __attribute__((always_inline)) {
      const V v = load(kept + (r * kShortVectors + k) * L);
      V q = kLog ? negative(v - by) : v * by;
      if constexpr (!kLog && sizeof(T) > 2) q += (v - q * l[r]) * by;  // as in finish
      if (left >= L) {
        storeu(y + r * y_step + k * L, q);
      } else {
        store_part(y + r * y_step + k * L, q, left);
      }
    });
  }
  return true;
}
#pragma GCC diagnostic pop

// The softmax of n plain numbers in one pass: each chunk's exponentials against a number near the largest so far go to
// the buffer, once more where the chunk rises far above it. Its logarithm needs but their sum, and no buffer. False
// where the numbers are too large for that.
template <class T, bool kPast, bool kLog>
bool plain_row(const T* x, int64_t n, double scale, T* y, compute<T>* buffer, compute<T>* bases) {
  using C = compute<T>;
  using V = vec_of<C>;
  constexpr int L = kLanesOf<C>, kLine = 64 / sizeof(T);
  constexpr C kRise = 64;  // a chunk of 2^64 is far from overflow
  const V none = splat(-kInfOf<C>);
  const C c = unit<C>(scale);
  if (n <= kShortVectors * L) return short_rows<T, kLog>(x, 0, y, 0, 1, n, scale);
  auto four = [&](const T* from, V* to) __attribute__((always_inline)) {
    LLMFAST_UNROLL
    for (int k = 0; k < 4; k += 2) load_two<true>(from + k * L, to[k], to[k + 1]);
  };
  Against<T, kLog> against{c};
  double l = 0;
  for (int64_t j = 0; j < n; j += kChunk) {
    const int64_t end = min(j + kChunk, n);
    double sum;
    C top;
    auto add = [&]() __attribute__((always_inline)) {
      V most[4] = {none, none, none, none}, sums[4] = {}, z;
      int64_t e = j;
      while (e + 4 * L <= end) {
        V some[4] = {};  // 8 numbers to a lane, so that the largest is rounded as seldom
        for (const int64_t stop = min(e + 32 * L, end); e + 4 * L <= stop; e += 4 * L) {
          if constexpr (kPast) LLMFAST_UNROLL  // what comes from memory; from a cache it is slower
          for (int p = 0; p < 4 * L; p += kLine) __builtin_prefetch(x + e + p + kChunk, 0, 2);
          V v[4];
          four(x + e, v);
          LLMFAST_UNROLL
          for (int k = 0; k < 4; k++) v[k] = against(v[k], z), most[k] = max(most[k], z), some[k] += v[k];
          if constexpr (!kLog) LLMFAST_UNROLL
          for (int k = 0; k < 4; k += 2) {
            if constexpr (kPast && std::is_same_v<T, bf16>) unmix(v[k], v[k + 1]);
            store(buffer + e + k * L, v[k]), store(buffer + e + (k + 1) * L, v[k + 1]);
          }
        }
        LLMFAST_UNROLL
        for (int k = 0; k < 4; k++) sums[k] += some[k];
      }
      for (; e < end; e += L) {
        const auto inside = iota<C>() < static_cast<C>(end - e);
        const V v = against(end - e >= L ? loadu(x + e) : load_part(x + e, end - e), z), some = inside ? v : V{};
        if constexpr (!kLog) store(buffer + e, some);
        sums[0] += some, most[0] = max(most[0], inside ? z : none);
      }
      sum = kLanes < 16 ? total(sums) : total((sums[0] + sums[1]) + (sums[2] + sums[3]));
      top = against.distance(greatest(max(max(most[0], most[1]), max(most[2], most[3]))));
    };
    if (j == 0) {  // nothing to count against yet: the largest of 64 numbers
      V most[4] = {none, none, none, none}, v[4];
      for (int64_t e = 0; e < 64 && e + 4 * L <= n; e += 4 * L) {
        four(x + e, v);
        LLMFAST_UNROLL
        for (int k = 0; k < 4; k++) most[k] = max(most[k], v[k] * c);
      }
      if (!against.rise(greatest(max(max(most[0], most[1]), max(most[2], most[3]))))) return false;
    }
    add();
    if (top > kRise) {
      const C before = against.base;
      if (!against.rise(top)) return false;
      l *= power(before - against.base), add();
    }
    if constexpr (!kLog) bases[j / kChunk] = against.base;
    l += sum;
  }
  if constexpr (kLog) {
    const C s = static_cast<C>(scale);
    const double base = c == 0 ? 0 : against.base * (static_cast<double>(s) / c);
    const C high = static_cast<C>(kBase2<C> ? base + log(l) : base), low = static_cast<C>(base - high + log(l));
    write<kPast>(x, n, y, [&](auto v) __attribute__((always_inline)) { return negative((v * s - high) - low); });
    return true;
  }
  const C inverse = static_cast<C>(1 / l), high = static_cast<C>(l), low = static_cast<C>(l - high);
  auto put = [&](int64_t j, auto&& f)
                 __attribute__((always_inline)) { write<kPast, !kPast>(buffer + j, min(kChunk, n - j), y + j, f); };
  if (sizeof(T) > 2 && n <= kChunk) {
    put(0, [&](auto v) {
      auto q = v * inverse;
      return q + ((v - q * high) - q * low) * inverse;  // the quotient, correctly rounded but for rare ties
    });
    return true;
  }
  for (int64_t j = 0; j < n; j += kChunk) {
    const C factor = power(bases[j / kChunk] - against.base) * inverse;
    put(j, [&](auto v) { return v * factor; });
  }
  return true;
}

// The first n numbers of a row, with any options.
template <class T>
void any_row(const Softmax& p, int64_t a, int64_t b, int64_t i, int64_t n, compute<T>* buffer, compute<T>* other) {
  using C = compute<T>;
  const T* x = at<T>(p.x, a, b, i);
  T* y = at<T>(p.y, a, b, i);
  if (n <= kChunk) return finish(p.log, buffer, n, fill(p, x, a, b, i, 0, n, false, buffer, other), y);
  C m = -kInfOf<C>, l = 0;
  for (int64_t j = 0; j < n; j += kChunk) {
    const int64_t c = min(kChunk, n - j);
    const C most = fill(p, x + j, a, b, i, j, c, false, buffer, other);
    if (most > m) l *= exp(m - most), m = most;
    l += sum_exp<false>(buffer, c, finite(m));
  }
  m = finite(m);
  const C inverse = l == 0 ? C(0) : 1 / l, lse = l == 0 ? C(0) : log(l);
  for (int64_t j = 0; j < n; j += kChunk) {
    const int64_t c = min(kChunk, n - j);
    fill(p, x + j, a, b, i, j, c, false, buffer, other);
    if (p.log) {
      write(buffer, c, y + j, [&](auto v) { return v - m - lse; });
    } else {
      write(buffer, c, y + j, [&](auto v) { return exponential<C>(v - m) * inverse; });
    }
  }
}

// once: plain_row serves; past: the result goes past the caches
template <class T>
void row(const Softmax& p, int64_t a, int64_t b, int64_t i, compute<T>* buffer, compute<T>* other, compute<T>* bases,
         bool once, bool past) {
  const int64_t N = p.x.size[3], n = clamp(i + p.offset + 1, 0, N);
  const T* x = at<T>(p.x, a, b, i);
  T* y = at<T>(p.y, a, b, i);
  if (reinterpret_cast<uintptr_t>(y) % sizeof(T)) past = false;
  auto* const softmax = past ? plain_row<T, true, false> : plain_row<T, false, false>;
  auto* const log_softmax = past ? plain_row<T, true, true> : plain_row<T, false, true>;
  auto* const plain = p.log ? log_softmax : softmax;
  if (!once || n == 0 || !plain(x, n, p.scale, y, buffer, bases)) any_row<T>(p, a, b, i, n, buffer, other);
  if (p.log) {
    for (int64_t j = n; j < N; j++) from_float(y + j, -kInfOf<compute<T>>);
  } else if (n < N) {
    memset(y + n, 0, (N - n) * sizeof(T));
  }
}

// How M rows that lie side by side are taken, a lane each: by four vectors while there are so many, then by one.
template <class C>
struct Lanes {
  static constexpr int64_t L = kLanesOf<C>;
  int64_t fours, groups;

  explicit Lanes(int64_t M) : fours(M / (4 * L)), groups(fours + (M % (4 * L) + L - 1) / L) {}
  int64_t first(int64_t group) const { return (group + 3 * min(group, fours)) * L; }
};

// Z vectors in the order of load_two<true>'s lanes, or of one vector the first n lanes.
template <int Z, class T, class V>
LLMFAST_INLINE void read_lanes(const T* from, int64_t n, V* to) {
  constexpr int L = kLanesOf<compute<T>>;
  if constexpr (Z == 1) {
    *to = n < L ? load_part(from, n) : loadu(from);
  } else {
    LLMFAST_UNROLL
    for (int z = 0; z < Z; z += 2) load_two<true>(from + z * L, to[z], to[z + 1]);
  }
}
template <int Z, class T, class V>
LLMFAST_INLINE void write_lanes(T* to, int64_t n, const V* v) {
  constexpr int L = kLanesOf<compute<T>>;
  if constexpr (Z > 1) {
    LLMFAST_UNROLL
    for (int z = 0; z < Z; z += 2) store_two<true>(to + z * L, v[z], v[z + 1]);
  } else if (n < L) {
    store_part(to, *v, n);
  } else {
    storeu(to, *v);
  }
}

constexpr int64_t kBlock = 256;  // what columns sum in the compute type; the blocks' sums are added in double

// Rows [i, i + Z kLanes) of plain numbers whose contiguous dimension is M, a lane each: buffer (N, Z kLanes) where N is
// at most kTall, else exponentials are taken twice.
template <int Z, class T>
void plain_columns(const Softmax& p, int64_t a, int64_t b, int64_t i, compute<T>* buffer) {
  using C = compute<T>;
  using V = vec_of<C>;
  constexpr int L = kLanesOf<C>;
  const int64_t N = p.x.size[3], count = p.x.size[2] - i;
  const C scale = static_cast<C>(p.scale);
  const T* const x = at<T>(p.x, a, b, i);
  T* const y = at<T>(p.y, a, b, i);
  V m[Z], v[Z];
  auto read = [&](int64_t j) __attribute__((always_inline)) { read_lanes<Z>(x + j * p.x.stride[3], count, v); };
  LLMFAST_UNROLL
  for (V& most : m) most = splat(-kInfOf<C>);
  for (int64_t j = 0; j < N; j++) {
    read(j);
    LLMFAST_UNROLL
    for (int k = 0; k < Z; k++) m[k] = max(m[k], v[k] * scale);
  }
  LLMFAST_UNROLL
  for (V& most : m) most = most == -kInfOf<C> ? V{} : most;
  double totals[Z * L] = {};
  for (int64_t j = 0; j < N; j += kBlock) {
    V sums[Z] = {};
    for (int64_t r = j; r < min(j + kBlock, N); r++) {
      read(r);
      LLMFAST_UNROLL
      for (int k = 0; k < Z; k++) {
        v[k] = exponential<C>(v[k] * scale - m[k]), sums[k] += v[k];
        if (N <= kTall && !p.log) store(buffer + (Z * r + k) * L, v[k]);
      }
    }
    for (int k = 0; k < Z * L; k++) totals[k] += sums[k / L][k % L];
  }
  V l[Z], inverse[Z];  // of log_softmax the logarithm of l
  for (int k = 0; k < Z * L; k++) {
    const C sum = static_cast<C>(totals[k]);
    l[k / L][k % L] = p.log ? (sum == 0 ? C(0) : log(sum)) : sum;
    inverse[k / L][k % L] = sum == 0 ? C(0) : 1 / sum;
  }
  for (int64_t j = 0; j < N; j++) {
    if (p.log || N > kTall) read(j);
    LLMFAST_UNROLL
    for (int k = 0; k < Z; k++) {
      if (p.log) {
        v[k] = (v[k] * scale - m[k]) - l[k];
      } else if (N > kTall) {
        v[k] = exponential<C>(v[k] * scale - m[k]) * inverse[k];
      } else {
        const V e = load(buffer + (Z * j + k) * L), q = e * inverse[k];
        v[k] = sizeof(T) == 2 ? q : q + (e - q * l[k]) * inverse[k];  // the quotient, as in finish
      }
    }
    write_lanes<Z>(y + j * p.y.stride[3], count, v);
  }
}

// Rows [i, i + kLanes) of a tensor whose contiguous dimension is M: buffer (kLanes, stride)
template <class T>
void columns(const Softmax& p, int64_t a, int64_t b, int64_t i, compute<T>* buffer, compute<T>* other) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  const int64_t N = p.x.size[3], count = min<int64_t>(L, p.x.size[2] - i), stride = (N + 63) / 64 * 64;
  const C scale = static_cast<C>(p.scale);
  const T* x = at<T>(p.x, a, b, i);
  T* y = at<T>(p.y, a, b, i);
  for (int64_t j = 0; j < N; j += L) {
    vec_of<C> r[L];
    for (int k = 0; k < L; k++) {
      const T* from = x + (j + k) * p.x.stride[3];
      r[k] = j + k >= N ? vec_of<C>{} : (count < L ? load_part(from, count) : loadu(from)) * scale;
    }
    transpose(r);
    for (int k = 0; k < L; k++) store(buffer + k * stride + j, r[k]);
  }
  for (int64_t k = 0; k < count; k++) {
    C* const mine = buffer + k * stride;
    const int64_t n = clamp(i + k + p.offset + 1, 0, N);
    const C m = fill(p, x, a, b, i + k, 0, n, true, mine, other);
    finish(p.log, mine, n, m, mine);
    for (int64_t j = n; j < N; j++) mine[j] = p.log ? -kInfOf<C> : C(0);
  }
  for (int64_t j = 0; j < N; j += L) {
    vec_of<C> r[L];
    for (int k = 0; k < L; k++) r[k] = load(buffer + k * stride + j);
    transpose(r);
    for (int k = 0; k < min<int64_t>(L, N - j); k++) {
      T* to = y + (j + k) * p.y.stride[3];
      if (count < L) {
        store_part(to, r[k], count);
      } else {
        storeu(to, r[k]);
      }
    }
  }
}

// How far apart rows are in memory, one like the next, or 0.
inline int64_t step_of(const Tensor& t) {
  int64_t step = 0, rows = 1;
  for (int k = 2; k >= 0; k--) {
    if (t.size[k] == 1) continue;
    if (step == 0) step = t.stride[k];
    if (t.stride[k] != step * rows) return 0;
    rows *= t.size[k];
  }
  return step;
}

template <class T>
void forward(const Softmax& p) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  const int64_t L1 = p.x.size[1], M = p.x.size[2], N = p.x.size[3];
  const bool across = N > 1 && p.x.stride[3] != 1, plain = !p.bias && !p.mask;
  const bool lanes = across && plain && p.offset >= N - 1;
  // in float32 only where products needn't be rounded before they are added
  const bool once = !across && plain && (p.log || N <= kKept) && (kFma || !std::is_same_v<T, float>);
  const int64_t rows = p.x.size[0] * L1 * M, x_step = step_of(p.x), y_step = step_of(p.y);
  const bool together = once && N <= kShortVectors * L && p.offset >= N - 1 && x_step && y_step;
  const Lanes<C> side(M);
  const int64_t step = lanes ? 4 * L : across || together ? L : 1;
  const int64_t groups = lanes ? side.groups : (M + step - 1) / step;
  const int64_t tasks = together ? (rows + L - 1) / L : p.x.size[0] * L1 * groups;
  const bool past = p.x.size[0] * L1 * M * N * static_cast<int64_t>(sizeof(T)) >= kStream;
  if (N == 0) return;
#pragma omp parallel if (tasks > 1 && tasks * step * N > 32768)
  {
    static thread_local Scratch scratch;
    const int64_t room = lanes ? min(N, kTall) : (across || (once && !p.log) ? N : min(N, kChunk)) + 64;
    C* const buffer = static_cast<C*>(scratch.bytes(((step + 1) * (room + 64) + kKept / kChunk + 1) * sizeof(C)));
    C* const other = buffer + step * (room / 64 * 64 + 64);
    C* const bases = buffer + (step + 1) * (room + 64);
    Indices task{L1, groups};
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tasks; t++) {
      if (together) {
        const int64_t r = t * L, end = min(r + L, rows);
        auto* const some = p.log ? short_rows<T, true> : short_rows<T, false>;
        const T* const x = at<T>(p.x, 0, 0, 0) + r * x_step;
        if (some(x, x_step, at<T>(p.y, 0, 0, 0) + r * y_step, y_step, end - r, N, p.scale)) continue;
        for (int64_t s = r; s < end; s++) row<T>(p, s / M / L1, s / M % L1, s % M, buffer, other, bases, once, past);
        continue;
      }
      task.go_to(t);
      const auto [a, b, i] = task.at;
      if (!across) {
        row<T>(p, a, b, i, buffer, other, bases, once, past);
      } else if (!lanes) {
        columns<T>(p, a, b, i * L, buffer, other);
      } else {
        (i < side.fours ? plain_columns<4, T> : plain_columns<1, T>)(p, a, b, side.first(i), buffer);
      }
    }
    drain();
  }
}

}  // namespace softmax_rows

void softmax_forward(const Softmax& p) {
  switch (p.x.dtype) {
    case Dtype::kFloat32:
      return softmax_rows::forward<float>(p);
    case Dtype::kBFloat16:
      return softmax_rows::forward<bf16>(p);
    case Dtype::kFloat16:
      return softmax_rows::forward<f16>(p);
    default:
      return softmax_rows::forward<double>(p);
  }
}

}  // namespace llmfast::cpu::LLMFAST_ISA
