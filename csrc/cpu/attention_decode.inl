// Attention of a few queries, o = softmax(scale q k^T) v with SIMD lanes over the head dim: k and v are streamed once,
// as they lie.
//
// The rows of a task are the queries of all heads that share a kv head; its keys are one split of kSplit = 512,
// computed from a fresh (m, l, acc). Partial results meet in key order by one formula, so the bits depend on the
// sequence alone. Up to 8 rows share each read of k and v: a vector repeats a few elements of k for each of them, and
// kDots keys are multiplied at a time. Reads Nk (D + Dv) elements for each kv head, writes rows * (Dv + 2) floats a
// split: under 2 % with 8 heads in a group.
namespace llmfast::cpu::LLMFAST_ISA {
namespace attention_dec {

constexpr int kBlock =
    64;  // keys between two updates of the maximum: k and v blocks of 32 KiB (float32, D = 128) stay in L2
constexpr int64_t kSplit = 512;  // enough tasks for the threads at 4 heads x 4096 keys

template <class T>
struct Task {
  const AttentionForward& a;
  Sequence seq;
  Rows<T> k, v;
  int64_t kv_head, group, D, Dv, wideD, wideDv, offset;
  bool adjusts;
};

// Partial results of one task: acc (rows, wideDv), l and m (rows). The sum l is float64 from the lanes on: lse is
// rounded once.
template <class C>
struct Partial {
  C* acc;
  double* l;
  C* m;
};

// What a step of scores reads: rows narrower than its numbers are widened once for all.
template <class T>
using stored = std::conditional_t<kPairs<T>, T, compute<T>>;

// Rows of one block on their way to L2, a line at a time and in the order in which they lie: DRAM is half as fast where
// every fourth line comes first. To L2 only, because a block fills L1 and its miss buffers alone hold too few lines in
// flight for DRAM. Not where kAsRead: what one row of queries reads the CPU foresees by itself, and 256 bytes of a row
// at a time are order enough; both are faster from L3 without the counting.
template <class T>
struct Ahead {
  static constexpr int64_t kLine = 64 / sizeof(T);
  const T* const* rows;
  int64_t width, row, at;

  Ahead(const T* const* rows, int64_t width, int64_t row, int64_t at = 0)
      : rows(rows), width(width), row(min<int64_t>(row, kBlock - 1)), at(at) {}
  __attribute__((always_inline)) void fetch() {
    __builtin_prefetch(rows[row] + at, 0, 2);
    at += kLine;
    if (at >= width) at = 0, row = min<int64_t>(row + 1, kBlock - 1);
  }
};

template <class T>
struct Workspace {
  using C = compute<T>;
  unit<T>* q;  // (rows, wideD / per): of each R rows (wideD / per / K, R, K)
  C* wide;     // (kDots, wideD): rows of k
  C* l;        // (rows, L): sums by lane
  alignas(64) C s[8 * kBlock], alpha[8], tile[kBlock];
  const T *k[kBlock], *v[kBlock], *next[kBlock];  // the rows of this block's keys, and of the next one's k
};

// K units of a row, as many times as they fit a vector; of a row's last ones n elements are there.
template <int K, class U, class T>
LLMFAST_INLINE auto repeated(const T* p) {
  return (std::conditional_t<std::is_same_v<U, int32_t>, ivec, vec_of<U>>)repeat<K * sizeof(U)>(p);
}
template <int K, class U, class T>
LLMFAST_INLINE auto repeated(const T* p, int64_t n) {
  T whole[K * sizeof(U) / sizeof(T)] = {};
  for (int64_t i = 0; i < n; i++) whole[i] = p[i];
  return repeated<K, U>(whole);
}

// Of N rows that share a read of k, how many have their products in one vector: half of them, so that a repeated
// element of k serves two vectors of q. With 8 rows that is 1 load a product, which the CPU does in the product's time,
// not 1.5.
template <int N>
constexpr int kAbreast = N >= 4 ? N / 2 : N;
// The keys of one call.
template <int N, class C>
constexpr int kKeys = kDots / N > kLanesOf<C> / kAbreast<N> ? kDots / N : kLanesOf<C> / kAbreast<N>;

// S[n][j + t] = q[n] . k[j + t] for N = G R rows, kDots sums in flight. A dot product is L sums, of every L-th unit
// each, that a tree adds up, whatever R is: lane r K + u of acc[g][a] has sum a K + u of row g R + r, so that K keys'
// sums meet in one vector (R, K); where fewer keys' sums are in flight a second pass has the others. Fetches the keys'
// rows of v meanwhile, as accumulate does the next block's k.
template <int N, class T>
LLMFAST_INLINE void scores(const Task<T>& x, Workspace<T>& w, const unit<T>* q, int64_t j, int64_t n) {
  using C = compute<T>;
  using S = stored<T>;
  constexpr int L = kLanesOf<C>, R = kAbreast<N>, G = N / R, K = L / R, J = kDots / N, kStep = K * kPer<T>,
                kLine = 64 / sizeof(T);
  constexpr bool kAsRead = N == 1;
  const int64_t rows = R * x.wideD / kPer<T>;  // units of q in one vector's rows
  vec_of<C> whole[G][kKeys<N, C>];
  Ahead<T> v(w.v, x.Dv, j);
  LLMFAST_UNROLL
  for (int first = 0; first < kKeys<N, C>; first += J) {
    vec_of<C> acc[G][R][J] = {};
    const S* k[J];
    auto fetch = [&](int64_t d) __attribute__((always_inline)) {
      LLMFAST_UNROLL
      for (int t = 0; t < J; t++) {
        if (K < L && std::is_same_v<S, T>) __builtin_prefetch(k[t] + d + kLine);
        if constexpr (kAsRead) {
          __builtin_prefetch(w.v[j + t] + d, 0, 2);
        } else {
          v.fetch();
        }
      }
    };
    LLMFAST_UNROLL
    for (int t = 0; t < J; t++) {
      const int64_t at = min<int64_t>(j + first + t, n - 1);
      if constexpr (std::is_same_v<S, T>) {
        k[t] = w.k[at];
      } else {
        widen(w.k[at], x.D, w.wide + t * x.wideD), k[t] = w.wide + t * x.wideD;
      }
    }
    auto step = [&](int64_t d, int a, auto&& keys) __attribute__((always_inline)) {
      decltype(load(q)) z[G];
      LLMFAST_UNROLL
      for (int g = 0; g < G; g++) z[g] = load(q + g * rows + d / kPer<T> * R);
      LLMFAST_UNROLL
      for (int t = 0; t < J; t++) {
        const auto y = keys(k[t] + d);
        LLMFAST_UNROLL
        for (int g = 0; g < G; g++) acc[g][a][t] = product(acc[g][a][t], z[g], y);
      }
    };
    auto every = [](const S* k) __attribute__((always_inline)) { return repeated<K, unit<T>>(k); };
    int64_t d = 0;
    for (; d + R * kStep <= x.D; d += R * kStep) {
      if (d % kLine == 0) fetch(d);
      LLMFAST_UNROLL
      for (int a = 0; a < R; a++) step(d + a * kStep, a, every);
    }
    LLMFAST_UNROLL
    for (int a = 0; a < R; a++) {  // the last ones, fewer than R steps
      const int64_t at = d + a * kStep, left = x.D - at;
      if (left >= kStep) {
        step(at, a, every);
      } else if (left > 0) {
        step(at, a, [&](const S* k) __attribute__((always_inline)) { return repeated<K, unit<T>>(k, left); });
      }
    }
    for (d = (d + kLine - 1) / kLine * kLine; d < x.Dv; d += kLine) fetch(d);
    LLMFAST_UNROLL
    for (int g = 0; g < G; g++) LLMFAST_UNROLL
    for (int t = 0; t < J; t++) {
      auto& y = acc[g];
      if constexpr (R >= 8) LLMFAST_UNROLL
      for (int a = 0; a < 4; a++) y[a][t] += y[a + 4][t];
      if constexpr (R >= 4) y[0][t] += y[2][t], y[1][t] += y[3][t];
      if constexpr (R >= 2) y[0][t] += y[1][t];
      whole[g][first + t] = y[0][t];
    }
  }
  LLMFAST_UNROLL
  for (int g = 0; g < G; g++) LLMFAST_UNROLL
  for (int t = 0; t < kKeys<N, C>; t += K) {
    alignas(64) C s[L];
    store(s, sums<K>(whole[g] + t));
    LLMFAST_UNROLL
    for (int r = 0; r < R; r++) __builtin_memcpy(w.s + (g * R + r) * kBlock + j + t, s + r * K, K * sizeof(C));
  }
}

// acc[r] = acc[r] * alpha[r] + sum over j of P[r][j] v[j], over Z vectors of head dims from d
template <int R, int Z, bool kPart, class T>
LLMFAST_INLINE void accumulate(const Task<T>& x, Workspace<T>& w, int64_t n, int64_t d, compute<T>* acc) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>, kStep = L * kPer<T>;
  constexpr int64_t kLine = Ahead<T>::kLine, kLines = Z * kStep < kLine ? 1 : Z * kStep / kLine;
  constexpr bool kAsRead = R == 1 || kLines >= 4;
  const int64_t whole = max<int64_t>((x.D + kLine - 1) / kLine, 1), before = d / (Z * kStep) * kLines * n;
  Ahead<T> next(w.next, x.D, before / whole, before % whole * kLine);
  vec_of<C> a[R][Z * kPer<T>];
  LLMFAST_UNROLL
  for (int r = 0; r < R; r++) LLMFAST_UNROLL
  for (int z = 0; z < Z * kPer<T>; z++) a[r][z] = load(acc + r * x.wideDv + d + z * L) * splat(w.alpha[r]);
  for (int64_t j = 0; j < n; j += kPer<T>) {
    decltype(load(w.q)) v[Z * kPer<T>];
    LLMFAST_UNROLL
    for (int y = 0; y < kPer<T>; y++) LLMFAST_UNROLL
    for (int z = 0; z < kLines; z++) {
      if constexpr (kAsRead) {
        __builtin_prefetch(w.next[j + y] + d + z * kLine, 0, 2);
      } else {
        next.fetch();
      }
    }
    LLMFAST_UNROLL
    for (int z = 0; z < Z; z++) {
      const int64_t at = d + z * kStep;
      v[z * kPer<T>] = units<T, kPart>(w.v[j] + at, x.Dv - at);
      if constexpr (kPairs<T>) {
        ivec odd = j + 1 < n ? units<T, kPart>(w.v[j + 1] + at, x.Dv - at) : ivec{};
        interleave(v[z * 2], odd, v[z * 2], v[z * 2 + 1]);
      }
    }
    LLMFAST_UNROLL
    for (int r = 0; r < R; r++) {
      auto p = splat(read<unit<T>>(reinterpret_cast<const char*>(w.s + r * kBlock), j / kPer<T>));
      LLMFAST_UNROLL
      for (int z = 0; z < Z * kPer<T>; z++) a[r][z] = product(a[r][z], p, v[z]);
    }
  }
  LLMFAST_UNROLL
  for (int r = 0; r < R; r++) LLMFAST_UNROLL
  for (int z = 0; z < Z * kPer<T>; z++) store(acc + r * x.wideDv + d + z * L, a[r][z]);
}

template <int R, class T>
LLMFAST_INLINE void accumulate_row(const Task<T>& x, Workspace<T>& w, int64_t n, compute<T>* acc) {
  constexpr int kStep = kLanesOf<compute<T>> * kPer<T>;
  constexpr int kFit = kRegisters / 2 / R / kPer<T>, kMost = 4 / kPer<T>,
                Z = kFit < 1       ? 1
                    : kFit > kMost ? kMost
                                   : kFit;
  int64_t d = 0;
  for (; d + Z * kStep <= x.Dv; d += Z * kStep) accumulate<R, Z, false>(x, w, n, d, acc);
  for (; d + kStep <= x.Dv; d += kStep) accumulate<R, 1, false>(x, w, n, d, acc);
  if (d < x.Dv) accumulate<R, 1, true>(x, w, n, d, acc);
}

// n elements of one row of a mask or bias, widened.
template <class C>
LLMFAST_INLINE const C* row_of(const Tensor& t, int64_t at, int64_t n, C* to) {
  const int64_t sj = t.stride[3];
  if constexpr (std::is_same_v<C, float>) {
    if (sj == 1 && t.dtype != Dtype::kFloat64) {
      switch (t.dtype) {
        case Dtype::kFloat32:
          return widen(reinterpret_cast<const float*>(t.data) + at, n, to), to;
        case Dtype::kBFloat16:
          return widen(reinterpret_cast<const bf16*>(t.data) + at, n, to), to;
        case Dtype::kFloat16:
          return widen(reinterpret_cast<const f16*>(t.data) + at, n, to), to;
        default:
          return widen(reinterpret_cast<const uint8_t*>(t.data) + at, n, to), to;
      }
    }
  }
  for (int64_t j = 0; j < n; j++) to[j] = element<C>(t, at + j * sj);
  return to;
}

// Scale, softcap, bias, ALiBi, mask and band over n scores of one row, then m, l, alpha, and P in place of S; lanes are
// keys.
template <class T>
LLMFAST_INLINE void softmax(const Task<T>& x, Workspace<T>& w, int r, int64_t row, int64_t j0, int64_t n,
                            compute<T>& m) {
  using C = compute<T>;
  using V = vec_of<C>;
  constexpr int L = kLanesOf<C>, N = kBlock / L;
  const AttentionSpec& spec = x.a.spec;
  const Extras& e = x.a.extras;
  const int64_t h = x.kv_head * x.group + row / x.seq.Nq, i = row % x.seq.Nq;
  const C scale = static_cast<C>(spec.scale), cap = static_cast<C>(spec.softcap);
  const double c = (x.adjusts ? 1 : __builtin_fabs(spec.scale)) * 1.4426950408889634;
  C* const s = w.s + r * kBlock;
  V y[N];
  LLMFAST_UNROLL
  for (int t = 0; t < N; t++) y[t] = load(s + t * L);
  auto each = [&](auto&& f) __attribute__((always_inline)) {
    LLMFAST_UNROLL
    for (int t = 0; t < N; t++) y[t] = f(y[t], t * L);
  };
  if (x.adjusts) {
    each([&](V y, int) { return y * scale; });
    if (cap != 0) each([&](V y, int) { return tanh(y * (1 / cap)) * cap; });
    if (e.bias) {
      const Tensor& t = e.bias;
      row_of(t, x.seq.b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + j0 * t.stride[3], n, w.tile);
      each([&](V y, int t) { return y + load(w.tile + t); });
    }
    if (const Tensor& t = e.alibi_slopes) {
      const C slope = element<C>(t, t.dim == 2 ? x.seq.b * t.stride[0] + h * t.stride[1] : h * t.stride[0]);
      each([&](V y, int t) { return y - abs(iota<C>() + static_cast<C>(j0 + t - i - x.offset)) * slope; });
    }
    if (e.mask) {
      const Tensor& t = e.mask;
      row_of(t, x.seq.b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + j0 * t.stride[3], n, w.tile);
      each([&](V y, int t) { return load(w.tile + t) == 0 ? splat(-kInfOf<C>) : y; });
    }
  } else if (scale < 0) {
    each([&](V y, int) { return -y; });
  }
  const int64_t low = max<int64_t>(0, i + x.offset - spec.left - j0), high = min(n, i + x.offset + spec.right + 1 - j0);
  if (low > 0 || high < kBlock) {
    const C a = static_cast<C>(min<int64_t>(low, kBlock)), b = static_cast<C>(max<int64_t>(high, 0));
    each([&](V y, int t) {
      V j = iota<C>() + static_cast<C>(t);
      return (j >= a) & (j < b) ? y : splat(-kInfOf<C>);
    });
  }
  V top = y[0];
  LLMFAST_UNROLL
  for (int t = 1; t < N; t++) top = max(top, y[t]);
  const C m_new = max(m, greatest(top));
  const C base = m_new == -kInfOf<C> ? C(0) : m_new;  // no key yet: 0
  const V alpha = exp2_fine(splat(m) - base, c);
  V l = load(w.l + row * L) * alpha;
  each([&](V y, int) { return exp2_fine(y - base, c); });
  LLMFAST_UNROLL
  for (int t = 0; t < N; t++) l += y[t];
  if constexpr (kPairs<T>) {  // bf16 in key order: the lower half of the row
    LLMFAST_UNROLL
    for (int t = 0; t < N; t++) storeu(reinterpret_cast<bf16*>(s) + t * L, y[t]);
  } else {
    LLMFAST_UNROLL
    for (int t = 0; t < N; t++) store(s + t * L, y[t]);
  }
  store(w.l + row * L, l);
  w.alpha[r] = alpha[0], m = m_new;
}

// Rows [row, row + R) over the keys of one block.
template <int R, class T>
void block(const Task<T>& x, Workspace<T>& w, Partial<compute<T>>& p, int64_t row, int64_t j0, int64_t n) {
  const unit<T>* const q = w.q + row * x.wideD / kPer<T>;
  for (int64_t j = 0; j < n; j += kKeys<R, compute<T>>) scores<R>(x, w, q, j, n);
  for (int r = 0; r < R; r++) softmax(x, w, r, row + r, j0, n, p.m[row + r]);
  accumulate_row<R>(x, w, n, p.acc + row * x.wideDv);
}

// f(row, R) for groups of at most L rows: 8, 4, 2, 1.
template <int L, class F>
LLMFAST_INLINE void in_groups(int64_t rows, F&& f) {
  int64_t row = 0;
  if constexpr (L >= 8)
    for (; rows - row >= 8; row += 8) f(row, std::integral_constant<int, 8>{});
  if constexpr (L >= 4)
    for (; rows - row >= 4; row += 4) f(row, std::integral_constant<int, 4>{});
  for (; rows - row >= 2; row += 2) f(row, std::integral_constant<int, 2>{});
  if (row < rows) f(row, std::integral_constant<int, 1>{});
}

// One split [first, end) of the keys, for all rows.
template <class T>
void split(const Task<T>& x, Workspace<T>& w, Partial<compute<T>> p, int64_t first, int64_t end) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  const int64_t rows = x.group * x.seq.Nq;
  for (int64_t row = 0; row < rows; row++) p.m[row] = -kInfOf<C>, p.l[row] = 0;
  if (first >= end) return;
  memset(p.acc, 0, rows * x.wideDv * sizeof(C));
  memset(w.l, 0, rows * L * sizeof(C));
  memset(w.q, 0, rows * x.wideD / kPer<T> * sizeof(unit<T>));
  in_groups<L>(rows, [&](int64_t row, auto R) {
    for (int r = 0; r < R; r++) {
      const int64_t h = x.kv_head * x.group + (row + r) / x.seq.Nq, i = (row + r) % x.seq.Nq;
      const Tensor& t = x.a.q;
      const T* q = reinterpret_cast<const T*>(t.data) + x.seq.batch * t.stride[0] + h * t.stride[1] + i * t.stride[2];
      constexpr int A = kAbreast<R>, K = L / A * kPer<T>;
      stored<T>* const to = reinterpret_cast<stored<T>*>(w.q + (row + r / A * A) * x.wideD / kPer<T>) + r % A * K;
      for (int64_t d = 0; d < x.D; d++) {
        if constexpr (kPairs<T>) {
          to[d / K * K * A + d % K] = q[d];
        } else {
          to[d / K * K * A + d % K] = to_float(q[d]);
        }
      }
    }
  });
  for (int64_t j0 = first; j0 < end; j0 += kBlock) {
    const int64_t n = min<int64_t>(kBlock, end - j0);
    for (int64_t j = 0; j < n; j++) w.k[j] = x.k.at(j0 + j), w.v[j] = x.v.at(j0 + j);
    for (int64_t j = n; j < kBlock; j++) w.v[j] = w.v[n - 1];
    for (int64_t j = 0; j < kBlock; j++) w.next[j] = x.k.at(min(j0 + kBlock + j, x.seq.Nk - 1));
    in_groups<L>(rows, [&](int64_t row, auto R) { block<R>(x, w, p, row, j0, n); });
  }
  for (int64_t row = 0; row < rows; row++)
    for (int lane = 0; lane < L; lane++) p.l[row] += w.l[row * L + lane];
}

// o and lse of one row from its splits, in key order.
template <class T, class F>
void merge(const AttentionForward& a, int64_t b, int64_t h, int64_t i, int64_t splits, double to_natural,
           compute<T>* sum, F&& partial) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  const int64_t Dv = a.v.size[3];
  const Tensor& sinks = a.extras.sinks;
  C top = -kInfOf<C>;
  double l = 0;
  for (int64_t t = 0; t < splits; t++) top = max(top, *partial(t).m);
  double m = top * to_natural, shrink = 1;  // natural units
  const C sink = sinks ? element<C>(sinks, h * sinks.stride[0]) : -kInfOf<C>;
  if (sink > m) shrink = exp(m - sink), m = sink;
  memset(sum, 0, Dv * sizeof(C));
  for (int64_t t = 0; t < splits; t++) {
    const Partial<C> p = partial(t);
    if (*p.l == 0) continue;
    const double factor = exp((*p.m - top) * to_natural) * shrink;
    l += *p.l * factor;
    for (int64_t d = 0; d < Dv; d += L) store(sum + d, load(sum + d) + load(p.acc + d) * static_cast<C>(factor));
  }
  if (sink > -kInfOf<C>) l += exp(sink - m);
  T* o = reinterpret_cast<T*>(a.o.data) + b * a.o.stride[0] + h * a.o.stride[1] + i * a.o.stride[2];
  const C inverse = static_cast<C>(l == 0 ? 0 : 1 / l);
  for (int64_t d = 0; d < Dv; d += L) {
    vec_of<C> y = load(sum + d) * inverse;
    if (Dv - d < L) {
      store_part(o + d, y, Dv - d);
    } else {
      storeu(o + d, y);
    }
  }
  if (a.lse)
    reinterpret_cast<C*>(a.lse.data)[b * a.lse.stride[0] + h * a.lse.stride[1] + i * a.lse.stride[2]] =
        l == 0 ? -kInfOf<C> : static_cast<C>(m + log(l));
}

template <class T>
void run(const AttentionForward& a) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  const int64_t B = a.q.size[0], H = a.q.size[1], Nq = a.q.size[2], D = a.q.size[3], Dv = a.v.size[3], Hk = a.k.size[1];
  const int64_t group = Hk ? H / Hk : 1, rows = group * Nq, wideD = wide(D), wideDv = wide(Dv);
  if (B * H * Nq == 0) return;
  const double scale = __builtin_fabs(a.spec.scale);
  const bool adjusts = a.extras.bias || a.extras.mask || a.extras.alibi_slopes || a.spec.softcap != 0 ||
                       scale < 1e-20 || std::is_same_v<C, double>;
  int64_t longest = 0;
  for (int64_t b = 0; b < B; b++) longest = max(longest, sequence(a.q, a.k, a.extras, b).Nk);
  const int64_t splits = max<int64_t>(1, (longest + kSplit - 1) / kSplit), tasks = B * Hk * splits;
  const int64_t lengths = rows * int64_t(sizeof(double) / sizeof(C)),
                stride = rows * wideDv + (lengths + rows + 15) / 16 * 16;  // of one task's partial results
  static thread_local Scratch results;
  C* const all = static_cast<C*>(results.bytes(tasks * stride * sizeof(C)));
  auto partial = [&](int64_t task, int64_t row) {
    C* at = all + task * stride;
    C* const ends = at + rows * wideDv;
    return Partial<C>{at + row * wideDv, reinterpret_cast<double*>(ends) + row, ends + lengths + row};
  };
#pragma omp parallel if (tasks > 1 && B * Hk * rows * longest * (D + Dv) > 200000)  // 10 us of work pay for the threads
  {
    static thread_local Scratch scratch;
    Workspace<T> w;
    C* at = static_cast<C*>(scratch.bytes(((rows + kDots) * wideD + rows * L + wideDv) * sizeof(C)));
    w.l = at, at += rows * L;
    w.q = reinterpret_cast<unit<T>*>(at), at += rows * wideD;
    w.wide = at, at += kDots * wideD;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tasks; t++) {
      const int64_t b = t / splits / Hk, head = t / splits % Hk;
      const Sequence s = sequence(a.q, a.k, a.extras, b);
      const Task<T> x{a,
                      s,
                      cpu::LLMFAST_ISA::rows<T>(a.k, a.extras, s, head),
                      cpu::LLMFAST_ISA::rows<T>(a.v, a.extras, s, head),
                      head,
                      group,
                      D,
                      Dv,
                      wideD,
                      wideDv,
                      s.Nk - Nq,
                      adjusts};
      const int64_t first = max(t % splits * kSplit, x.offset - a.spec.left);  // keys that some query sees
      const int64_t end = min(min((t % splits + 1) * kSplit, s.Nk), Nq + x.offset + a.spec.right);
      split(x, w, partial(t, 0), first, end);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < B * H * Nq; t++) {
      const int64_t b = t / Nq / H, h = t / Nq % H, i = t % Nq;
      merge<T>(a, b, h, i, splits, adjusts ? 1 : scale, at,
               [&](int64_t n) { return partial((b * Hk + h / group) * splits + n, h % group * Nq + i); });
    }
  }
}

}  // namespace attention_dec

// Without gradient only: the backward sums a score in the forward's order.
void attention_decode(const AttentionForward& a) {
  if (a.q.size[2] > kDecodeQueries) return attention_forward(a);
  switch (a.q.dtype) {
    case Dtype::kFloat32:
      return attention_dec::run<float>(a);
    case Dtype::kBFloat16:
      return attention_dec::run<bf16>(a);
    case Dtype::kFloat16:
      return attention_dec::run<f16>(a);
    default:
      return attention_dec::run<double>(a);
  }
}

}  // namespace llmfast::cpu::LLMFAST_ISA
