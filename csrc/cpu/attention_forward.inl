// Attention forward, o = softmax(scale q k^T) v, flash form with SIMD lanes over queries.
//
// One task is kRows = 64 queries of one (sequence, head). q is transposed once; k is broadcast element by element
// straight from memory, so it is never packed; maxima, sums and rescaling are vertical. |scale| * log2(e) enters with
// the exponential as one fused multiply-add, its sign with q. Keys come in blocks of kKeys = 96 or 128. Where the
// machine has bf16 dot products, the unit of the two products is a pair: of head dims in q k^T, of keys in p v (p
// packed over S, v interleaved). Other half precision, and pages, are copied to scratch. Q^T, S and O^T lie in panels
// of kPanel queries, which go through a block of keys one after the other.
//
// Up to kTogether query blocks of one kv head go through the keys together: a block of keys is copied or interleaved
// once and read from L2. Key blocks begin at multiples of kKeys, so bits don't depend on how query blocks are grouped.
namespace llmfast::cpu::LLMFAST_ISA {

constexpr int64_t kDecodeQueries =
    8;  // from 9 on the 64-row tiles are faster, whatever Nk and the group (measured on Zen 5)

namespace attention_fwd {

constexpr int kRows = 64, kMostKeys = 128, kStrip = 16;
template <class T>  // rows of 512 bytes share sets of L1: 128 of float32 in place are slower
constexpr int kKeys = kPairs<T> ? kMostKeys : 96;
template <class T>  // bf16, D = 128: interleaving v for each query block costs 6 % of the time, for four together 1.5 %
constexpr int kTogether = std::is_same_v<T, compute<T>> && kRegisters == 32 ? 1 : 4;  // AVX2: k, v leave L3 once for 4
constexpr int64_t kTogetherBytes = 256 << 10;  // of Q^T and O^T, a quarter of L2 (1 MiB on Zen 4)
constexpr int kTileV = kRegisters / 8;         // AVX-512 and NEON: 6 x 4 of 32 registers; AVX2 and SSE: 6 x 2 of 16
constexpr int kTileR = 6;
template <class C>  // queries in a panel, a tile's width: rows of 256 bytes would share a quarter of L1's sets
constexpr int kPanel = kTileV * kLanesOf<C>;
// Where vector g of the queries begins in a matrix of `rows` rows; the next row is kPanel further.
template <class C, class U>
LLMFAST_INLINE U* column(U* matrix, int64_t rows, int g) {
  return matrix + g / kTileV * rows * kPanel<C> + g % kTileV * kLanesOf<C>;
}
template <class C>  // head dims summed in one accumulator, so that long sums err no more than a BLAS
constexpr int64_t kChunk = std::is_same_v<C, double> ? 16
                           : kFma                    ? 64
                                                     : 32;
// The same for a sequence of few queries, where the errors of a long chain don't average out. Forward and backward must
// agree.
template <class C>
LLMFAST_INLINE int64_t chunk(int64_t Nq) {
  return Nq <= kDecodeQueries ? 8 : kChunk<C>;
}

// One block of queries and where it stands.
template <class T>
struct Block {
  using C = compute<T>;
  const AttentionForward& a;
  Sequence seq;
  int64_t h, i0, nq, D, Dv, offset;  // queries [i0, i0 + nq); key j lies offset = Nk - Nq right of query j
  bool adjusts;                      // S holds finished scores; otherwise q k^T still to be scaled
  unit<T>* qt;                       // (64 / kPanel, wide(D), kPanel), in units
  C *o, *m, *l, *alpha;              // (64 / kPanel, wide(Dv), kPanel), (64,), (64,), (64,)

  int64_t first() const { return max<int64_t>(0, i0 + offset - a.spec.left) / kStrip * kStrip; }
  int64_t end() const { return min(seq.Nk, i0 + nq + offset + a.spec.right); }  // keys [first, end) are seen
};

// Keys [j0, j0 + n) as the products read them: row pointers and strides in bytes.
struct Staged {
  const char *k, *v;
  int64_t sk, sv;
};

template <class T>
struct Workspace {
  using C = compute<T>;
  unit<T>* v;       // (128, Dv), in units
  T* k_copy;        // bf16 pairs that can't be read in place: (128, D)
  C *k, *s, *tile;  // (128, D), (64 / kPanel, 128, kPanel), (16, 64)
  C* parts;         // the blocks' qt, o, m, l, alpha
  int64_t part_size;
};

// S[r][v] = sum over d of k[r][d] * qt[d][v]: R keys x V vectors of queries; two steps a turn are 1 % faster than one
template <int R, int V, class C, class U>
LLMFAST_INLINE void scores(const U* qt, const char* k, int64_t sk, int64_t units, int64_t chunk, C* s) {
  constexpr int L = kLanesOf<C>;
  for (int64_t d0 = 0; d0 == 0 || d0 < units; d0 += chunk) {
    vec_of<C> acc[R][V];
    LLMFAST_UNROLL
    for (int r = 0; r < R; r++) LLMFAST_UNROLL
    for (int v = 0; v < V; v++) acc[r][v] = vec_of<C>{};
    auto step = [&](int64_t d) __attribute__((always_inline)) {
      decltype(load(qt)) q[V];
      LLMFAST_UNROLL
      for (int v = 0; v < V; v++) q[v] = load(qt + d * kPanel<C> + v * L);
      LLMFAST_UNROLL
      for (int r = 0; r < R; r++) multiply_add_row<C, U>(acc[r], k + r * sk + d * sizeof(U), q);
    };
    const int64_t d1 = min(units, d0 + chunk);
    int64_t d = d0;
    for (; d + 2 <= d1; d += 2) step(d), step(d + 1);
    for (; d < d1; d++) step(d);
    LLMFAST_UNROLL
    for (int r = 0; r < R; r++) LLMFAST_UNROLL
    for (int v = 0; v < V; v++) {
      C* at = s + r * kPanel<C> + v * L;
      store(at, d0 ? load(at) + acc[r][v] : acc[r][v]);
    }
  }
}

// O[r][v] = O[r][v] * alpha[v] + sum over j of v[j][r] * P[j][v]: R head dims x V vectors of queries
template <int R, int V, class C, class U>
LLMFAST_INLINE void accumulate(const U* p, const char* v, int64_t sv, int64_t units, C* o, const C* alpha) {
  constexpr int L = kLanesOf<C>;
  vec_of<C> acc[R][V];
  LLMFAST_UNROLL
  for (int r = 0; r < R; r++) LLMFAST_UNROLL
  for (int x = 0; x < V; x++) acc[r][x] = load(o + r * kPanel<C> + x * L) * load(alpha + x * L);
  auto step = [&](int64_t j) __attribute__((always_inline)) {
    decltype(load(p)) w[V];
    LLMFAST_UNROLL
    for (int x = 0; x < V; x++) w[x] = load(p + j * kPanel<C> + x * L);
    LLMFAST_UNROLL
    for (int r = 0; r < R; r++) multiply_add_row<C, U>(acc[r], v + j * sv + r * sizeof(U), w);
  };
  int64_t j = 0;
  for (; j + 2 <= units; j += 2) step(j), step(j + 1);
  for (; j < units; j++) step(j);
  LLMFAST_UNROLL
  for (int r = 0; r < R; r++) LLMFAST_UNROLL
  for (int x = 0; x < V; x++) store(o + r * kPanel<C> + x * L, acc[r][x]);
}

// Calls f<R>(first row) over n rows, in tiles that fill the registers beside V vectors.
template <int V, class F>
LLMFAST_INLINE void tiles(int64_t n, F&& f) {
  constexpr int R = V == 1 ? 12 : V == 2 && kTileV == 4 ? 12 : V == 3 ? 8 : kTileR;
  int64_t r = 0;
  for (; n - r >= R && n - r != 8; r += R) f(r, std::integral_constant<int, R>{});
  for (; n - r >= 4; r += 4) f(r, std::integral_constant<int, 4>{});
  if (n - r >= 2) f(r, std::integral_constant<int, 2>{}), r += 2;
  if (r < n) f(r, std::integral_constant<int, 1>{});
}

// Calls f<V>(first vector) over the vectors [v0, v1), those of a panel together.
template <class F>
LLMFAST_INLINE void vectors(int v0, int v1, F&& f) {
  while (v0 < v1) {
    const int n = min(v1 - v0, kTileV - v0 % kTileV);
    if (n == kTileV) f(v0, std::integral_constant<int, kTileV>{});
    if constexpr (kTileV == 4) {
      if (n == 3) f(v0, std::integral_constant<int, 3>{});
      if (n == 2) f(v0, std::integral_constant<int, 2>{});
    }
    if (n == 1) f(v0, std::integral_constant<int, 1>{});
    v0 += n;
  }
}

// Q^T in units, its rows times the sign of scale; rows past nq are zero.
template <class T>
void transpose_q(const Block<T>& x) {
  using U = unit<T>;
  using V = decltype(load(x.qt));
  constexpr int L = sizeof(V) / sizeof(U), kStep = L * kPer<T>, P = kPanel<compute<T>>;
  const bool negative = x.a.spec.scale < 0;
  const Tensor& from = x.a.q;
  const T* const rows = reinterpret_cast<const T*>(from.data) + x.seq.batch * from.stride[0] + x.h * from.stride[1] +
                        (x.seq.q0 + x.i0) * from.stride[2];
  for (int64_t g = 0; g < kRows; g += L)
    for (int64_t d = 0; d < x.D; d += kStep) {
      V r[L];
      for (int i = 0; i < L; i++) {
        const T* q = rows + (g + i) * from.stride[2] + d;
        if (g + i >= x.nq) {
          r[i] = V{};
        } else if constexpr (kPairs<T>) {
          bf16 part[kStep] = {};
          if (x.D - d < kStep)
            for (int64_t e = 0; e < x.D - d; e++) part[e] = q[e];
          r[i] = loadu(reinterpret_cast<const int32_t*>(x.D - d < kStep ? part : q));
          if (negative) r[i] ^= static_cast<int32_t>(0x80008000);
        } else {
          r[i] = x.D - d < kStep ? load_part(q, x.D - d) : loadu(q);
          if (negative) r[i] = -r[i];
        }
      }
      transpose(r);
      U* const to = column<compute<T>>(x.qt, wide(x.D), g / L) + d / kStep * L * P;
      for (int i = 0; i < L; i++) store(to + i * P, r[i]);
    }
}

// A strip (n <= 16 keys, queries [i, end)) of a mask or bias tensor, transposed and widened: tile (16, 64). i is that
// of a vector's first query.
template <class E, class C>
void strip_of(const E* p, int64_t si, int64_t sj, int64_t i, int64_t end, int64_t n, C* tile) {
  constexpr int L = kLanesOf<C>;
  if (si == 0) {
    for (int64_t j = 0; j < n; j++)
      for (int64_t g = i; g < end; g += L) store(tile + j * kRows + g, splat(static_cast<C>(to_float(p[j * sj]))));
    return;
  }
  if constexpr (std::is_same_v<C, float> && !std::is_same_v<E, double>) {
    if (sj == 1) {
      for (int64_t g = i; g < end; g += L)
        for (int64_t j = 0; j < n; j += L) {
          vec r[L];
          for (int lane = 0; lane < L; lane++) {
            const E* at = p + (g + lane) * si + j;
            r[lane] = g + lane >= end ? vec{} : n - j < L ? load_part(at, n - j) : loadu(at);
          }
          transpose(r);
          for (int lane = 0; lane < L; lane++) store(tile + (j + lane) * kRows + g, r[lane]);
        }
      return;
    }
  }
  for (int64_t j = 0; j < n; j++)
    for (int64_t g = i; g < end; g++) tile[j * kRows + g] = static_cast<C>(to_float(p[g * si + j * sj]));
}

template <class T>
void strip_of(const Block<T>& x, const Tensor& t, int64_t j0, int64_t n, int v0, int v1, compute<T>* tile) {
  constexpr int L = kLanesOf<compute<T>>;
  const int64_t si = t.stride[2], sj = t.stride[3], i = v0 * L, end = min<int64_t>(v1 * L, x.nq);
  const int64_t at = x.seq.b * t.stride[0] + x.h * t.stride[1] + x.i0 * si + j0 * sj;
  switch (t.dtype) {
    case Dtype::kFloat32:
      return strip_of(reinterpret_cast<const float*>(t.data) + at, si, sj, i, end, n, tile);
    case Dtype::kBFloat16:
      return strip_of(reinterpret_cast<const bf16*>(t.data) + at, si, sj, i, end, n, tile);
    case Dtype::kFloat16:
      return strip_of(reinterpret_cast<const f16*>(t.data) + at, si, sj, i, end, n, tile);
    case Dtype::kBool:
      return strip_of(reinterpret_cast<const uint8_t*>(t.data) + at, si, sj, i, end, n, tile);
    default:
      return strip_of(reinterpret_cast<const double*>(t.data) + at, si, sj, i, end, n, tile);
  }
}

// Calls f(score, key, vector) for a strip of n scores of the vectors [v0, v1), and stores what it gives.
template <class T, class F>
LLMFAST_INLINE void each_score(compute<T>* s, int64_t n, int v0, int v1, F&& f) {
  using C = compute<T>;
  for (int64_t j = 0; j < n; j++)
    for (int g = v0; g < v1; g++) {
      C* at = column<C>(s, kKeys<T>, g) + j * kPanel<C>;
      store(at, f(load(at), j, g));
    }
}

// Scale, softcap, bias and ALiBi over a strip.
template <class T>
void adjust(const Block<T>& x, compute<T>* s, compute<T>* tile, int64_t j0, int64_t n, int v0, int v1) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  const AttentionSpec& spec = x.a.spec;
  const Extras& e = x.a.extras;
  const C scale = static_cast<C>(__builtin_fabs(spec.scale)), cap = static_cast<C>(spec.softcap);
  const Tensor& slopes = e.alibi_slopes;
  const C slope = slopes ? element<C>(slopes, slopes.dim == 2 ? x.seq.b * slopes.stride[0] + x.h * slopes.stride[1]
                                                              : x.h * slopes.stride[0])
                         : C(0);
  const bool bias = bool(e.bias), alibi = bool(slopes);
  if (bias) strip_of(x, e.bias, j0, n, v0, v1, tile);
  each_score<T>(s, n, v0, v1, [&](auto y, int64_t j, int g) {
    y = y * scale;
    if (cap != 0) y = tanh(y * (1 / cap)) * cap;
    if (bias) y += load(tile + j * kRows + g * L);
    if (alibi) y -= abs(iota<C>() + static_cast<C>(x.i0 + x.offset + g * L - j0 - j)) * slope;
    return y;
  });
}

// The mask over a strip: its scores may still lack their scale.
template <class T>
void hide(const Block<T>& x, compute<T>* s, compute<T>* tile, int64_t j0, int64_t n, int v0, int v1) {
  using C = compute<T>;
  strip_of(x, x.a.extras.mask, j0, n, v0, v1, tile);
  each_score<T>(s, n, v0, v1, [&](auto y, int64_t j, int g) {
    return load(tile + j * kRows + g * kLanesOf<C>) == 0 ? splat(-kInfOf<C>) : y;
  });
}

// The band's edges over a strip: hides keys outside [i + offset - left, i + offset + right] from query i.
template <class T>
LLMFAST_INLINE void band(const Block<T>& x, compute<T>* s, int64_t j0, int64_t n, int v0, int v1) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  for (int g = v0; g < v1; g++) {
    const int64_t i = x.i0 + g * L + x.offset;  // lane 0 on the diagonal
    if (j0 + n - 1 <= i + x.a.spec.right && j0 >= i + L - 1 - x.a.spec.left) continue;
    for (int64_t j = 0; j < n; j++) {
      const C low = static_cast<C>(clamp(j0 + j - x.a.spec.right - i, -1, L));
      const C high = static_cast<C>(clamp(j0 + j + x.a.spec.left - i, -1, L));
      C* at = column<C>(s, kKeys<T>, g) + j * kPanel<C>;
      store(at, (iota<C>() < low) | (iota<C>() > high) ? splat(-kInfOf<C>) : load(at));
    }
  }
}

// Zeroes the probabilities of n <= 16 keys that dropout takes, for one vector of queries; j0 is a multiple of 4.
template <class T>
LLMFAST_INLINE void drop(const Block<T>& x, compute<T>* p, int64_t j0, int64_t n, int g) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  const uint64_t threshold = static_cast<uint64_t>(x.a.spec.dropout_p * 4294967296.);
  const uint64_t key = static_cast<uint64_t>(*reinterpret_cast<const int64_t*>(x.a.extras.seed.data));
  for (int64_t j = 0; j < n; j += 4) {
    wvec c[4] = {wvec{} + static_cast<uint32_t>((j0 + j) / 4),
                 (wvec)iota<int32_t>() + static_cast<uint32_t>(x.i0 + g * L), wvec{} + static_cast<uint32_t>(x.h),
                 wvec{} + static_cast<uint32_t>(x.seq.b)};
    philox(c, key);
    for (int word = 0; word < min<int64_t>(4, n - j); word++) {
      C* at = p + (j + word) * kPanel<C>;
      if constexpr (std::is_same_v<C, float>) {
        store(at, threshold >> 32 ? vec{} : c[word] >= static_cast<uint32_t>(threshold) ? load(at) : vec{});
      } else {
        for (int lane = 0; lane < L; lane++)
          if (c[word][lane] < threshold) at[lane] = 0;
      }
    }
  }
}

template <class T>
LLMFAST_INLINE Staged stage(const Rows<T>& k, const Rows<T>& v, int64_t D, int64_t Dv, Workspace<T>& w, int64_t j0,
                            int64_t n) {
  using C = compute<T>;
  const bool whole = !k.pages;
  auto chars = [](const void* p) { return static_cast<const char*>(p); };
  if constexpr (kPairs<T>) {
    constexpr int kStep = 2 * kLanes;
    const int64_t sv = (Dv + kStep - 1) / kStep * kStep, sk = (D + 1) / 2 * 2;
    const bf16 zeros[kStep] = {};
    for (int64_t j = 0; j < n; j += 2) {
      const bf16 *a = v.at(j0 + j), *b = j + 1 < n ? v.at(j0 + j + 1) : nullptr;
      for (int64_t d = 0; d < Dv; d += kStep) {
        bf16 parts[2][kStep] = {};
        if (Dv - d < kStep)
          for (int64_t e = 0; e < Dv - d; e++) parts[0][e] = a[d + e], parts[1][e] = b ? b[d + e] : bf16{};
        const bool part = Dv - d < kStep;
        ivec low, high;
        interleave(loadu(reinterpret_cast<const int32_t*>(part ? parts[0] : a + d)),
                   loadu(reinterpret_cast<const int32_t*>(part ? parts[1]
                                                          : b  ? b + d
                                                               : zeros)),
                   low, high);
        store(w.v + j / 2 * sv + d, low), store(w.v + j / 2 * sv + d + kLanes, high);
      }
    }
    if (whole && D % 2 == 0) return {chars(k.at(j0)), chars(w.v), k.stride * 2, sv * 4};
    for (int64_t j = 0; j < n; j++) {
      memcpy(w.k_copy + j * sk, k.at(j0 + j), D * 2);
      if (D % 2) w.k_copy[j * sk + D] = bf16{};
    }
    return {chars(w.k_copy), chars(w.v), sk * 2, sv * 4};
  } else {
    if constexpr (std::is_same_v<T, C>)
      if (whole)
        return {chars(k.at(j0)), chars(v.at(j0)), k.stride * int64_t(sizeof(T)), v.stride * int64_t(sizeof(T))};
    const int64_t sk = (D + 15) / 16 * 16, sv = (Dv + 15) / 16 * 16;
    for (int64_t j = 0; j < n; j++) widen(k.at(j0 + j), D, w.k + j * sk), widen(v.at(j0 + j), Dv, w.v + j * sv);
    return {chars(w.k), chars(w.v), sk * int64_t(sizeof(C)), sv * int64_t(sizeof(C))};
  }
}

// P = 2^((s - m) c), which is exactly 1 where s = m. For half precision m is in base-2 units and P = 2^(s c - m), one
// fused step less.
template <class T>
constexpr bool kBase2 = sizeof(T) == 2;
template <class T, int K>
LLMFAST_INLINE void weights(vec_of<compute<T>> (&s)[K], vec_of<compute<T>> m, compute<T> c) {
  LLMFAST_UNROLL
  for (int i = 0; i < K; i++) s[i] = kBase2<T> ? s[i] * c - m : s[i] - m;
  exp2(s, kBase2<T> ? compute<T>(1) : c);
}

// One vector of queries over the strips of S it sees: m, l, alpha, and P in place of S.
template <class T>
__attribute__((noinline)) void softmax(const Block<T>& x, Workspace<T>& w, int64_t j0, int64_t n, int g, const int* v0,
                                       const int* v1, compute<T> c) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>, P = kPanel<C>;
  using V = vec_of<C>;
  C* s = column<C>(w.s, kKeys<T>, g);
  const bool drops = x.a.spec.dropout_p != 0;
  int t0 = 0, t1 = static_cast<int>((n + kStrip - 1) / kStrip);  // the strips that see g follow one another
  while (t0 < t1 && (g < v0[t0] || v1[t0] <= g)) t0++;
  while (t0 < t1 && (g < v0[t1 - 1] || v1[t1 - 1] <= g)) t1--;
  const int64_t first = t0 * kStrip, end = min<int64_t>(t1 * kStrip, n);
  V most = V{} - kInfOf<C>, other = most;
  int64_t j = first;
  for (; j + 2 <= end; j += 2) most = max(most, load(s + j * P)), other = max(other, load(s + (j + 1) * P));
  if (j < end) most = max(most, load(s + j * P));
  most = max(most, other);
  const C unit = kBase2<T> ? c : C(1);
  V m_old = load(x.m + g * L), m_new = max(m_old, most * unit);
  V m = m_new == -kInfOf<C> ? V{} : m_new;  // no key yet: 0
  V alpha = exp2(m_old - m, kBase2<T> ? C(1) : c), sum = V{}, odd = V{};
  auto pack = [&](int64_t j, auto even, auto odd) __attribute__((always_inline)) {
    store(reinterpret_cast<int32_t*>(s) + j / 2 * P, pairs(even, odd));
  };
  auto weigh = [&](auto K) __attribute__((always_inline)) {
    V p[K.value];
    LLMFAST_UNROLL
    for (int i = 0; i < K.value; i++) p[i] = load(s + (j + i) * P);
    weights<T>(p, m, c);
    LLMFAST_UNROLL
    for (int i = 0; i < K.value; i++) (i % 2 ? odd : sum) += p[i];
    if constexpr (kPairs<T>) {
      if (!drops) {
        LLMFAST_UNROLL
        for (int i = 0; i < K.value; i += 2) pack(j + i, p[i], i + 1 < K.value ? p[i + 1] : V{});
        return;
      }
    }
    LLMFAST_UNROLL
    for (int i = 0; i < K.value; i++) store(s + (j + i) * P, p[i]);
  };
  j = first;
  for (; j + kInStep <= end; j += kInStep) weigh(std::integral_constant<int, kInStep>{});
  for (; j + 2 <= end; j += 2) weigh(std::integral_constant<int, 2>{});
  if (j < end) weigh(std::integral_constant<int, 1>{});
  if (drops) drop(x, s + first * P, j0 + first, end - first, g);
  if constexpr (kPairs<T>)
    if (drops)
      for (j = first; j < end; j += 2) pack(j, load(s + j * P), j + 1 < end ? load(s + (j + 1) * P) : V{});
  store(x.m + g * L, m_new);
  store(x.alpha + g * L, alpha);
  store(x.l + g * L, load(x.l + g * L) * alpha + (sum + odd));
}

// o = O^T / l transposed back, lse, sinks.
template <class T>
void finish(const Block<T>& x, compute<T> to_natural) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  const Tensor &sinks = x.a.extras.sinks, &lse = x.a.lse;
  const double p = x.a.spec.dropout_p;
  const C keep = p < 1 ? static_cast<C>(1 / (1 - p)) : C(0);
  auto start = [&](const Tensor& t) {
    return x.seq.batch * t.stride[0] + x.h * t.stride[1] + (x.seq.q0 + x.i0) * t.stride[2];
  };
  for (int64_t i = 0; i < x.nq; i++) {
    C m = x.m[i] * to_natural, l = x.l[i];
    if (l == 0) m = -kInfOf<C>;
    C inverse = l == 0 ? C(0) : keep / l;
    if (sinks) {
      const C sink = element<C>(sinks, x.h * sinks.stride[0]), both = m < sink ? sink : m;
      if (sink > -kInfOf<C>) {
        const C shrink = exp(m - both);
        l = l * shrink + exp(sink - both), m = both, inverse = keep * shrink / l;
      }
    }
    if (lse) reinterpret_cast<C*>(lse.data)[start(lse) + i * lse.stride[2]] = l == 0 ? -kInfOf<C> : m + log(l);
    x.alpha[i] = inverse;
  }
  T* const o = reinterpret_cast<T*>(x.a.o.data) + start(x.a.o);
  for (int64_t g = 0; g < x.nq; g += L)
    for (int64_t d = 0; d < x.Dv; d += L) {
      vec_of<C> r[L];
      for (int i = 0; i < L; i++)
        r[i] = load(column<C>(x.o, wide(x.Dv), g / L) + (d + i) * kPanel<C>) * load(x.alpha + g);
      transpose(r);
      for (int i = 0; i < min<int64_t>(L, x.nq - g); i++) {
        T* to = o + (g + i) * x.a.o.stride[2] + d;
        if (x.Dv - d < L) {
          store_part(to, r[i], x.Dv - d);
        } else {
          storeu(to, r[i]);
        }
      }
    }
}

// Keys [j0, j0 + n) of one block, n <= 128, a part of those staged: a panel of queries after the other, so that its S
// stays in L1.
template <class T>
void attend(const Block<T>& x, Workspace<T>& w, const Staged& kv, int64_t j0, int64_t n, compute<T> c) {
  using C = compute<T>;
  using U = unit<T>;
  constexpr int L = kLanesOf<C>;
  const AttentionSpec& spec = x.a.spec;
  const int used = static_cast<int>((x.nq + L - 1) / L), strips = static_cast<int>((n + kStrip - 1) / kStrip);
  for (int panel = 0; panel < used; panel += kTileV) {
    const int last = min(panel + kTileV, used);
    int v0[kMostKeys / kStrip], v1[kMostKeys / kStrip];  // the panel's vectors that see one of a strip's keys
    for (int t = 0; t < strips; t++) {
      const int64_t a0 = j0 + t * kStrip, a1 = min<int64_t>(a0 + kStrip, j0 + n) - 1;
      const int64_t low = a0 - x.offset - spec.right - x.i0, high = a1 - x.offset + spec.left - x.i0;
      v0[t] = static_cast<int>(clamp(low, panel * L, last * L) / L);
      v1[t] = static_cast<int>(high < 0 ? 0 : clamp(high / L + 1, v0[t], last));
      if (v1[t] < v0[t]) v1[t] = v0[t];
    }
    // Calls f(first key, keys, v0, v1) for runs of strips that the same vectors see.
    auto runs = [&](auto&& f) __attribute__((always_inline)) {
      for (int t = 0; t < strips;) {
        int u = t + 1;
        while (u < strips && v0[u] == v0[t] && v1[u] == v1[t]) u++;
        f(t * kStrip, min<int64_t>(u * kStrip, n) - t * kStrip, v0[t], v1[t]);
        t = u;
      }
    };
    runs([&](int64_t j, int64_t m, int a0, int a1) {
      vectors(a0, a1, [&](int g, auto V) {
        tiles<V.value>(m, [&](int64_t r, auto R) {
          scores<R.value, V.value, C, U>(column<C>(x.qt, wide(x.D), g), kv.k + (j + r) * kv.sk, kv.sk,
                                         (x.D + kPer<T> - 1) / kPer<T>, chunk<C>(x.seq.Nq),
                                         column<C>(w.s, kKeys<T>, g) + (j + r) * kPanel<C>);
        });
      });
    });
    for (int t = 0; t < strips; t++) {
      C* s = w.s + t * kStrip * kPanel<C>;
      const int64_t j = j0 + t * kStrip, m = min<int64_t>(kStrip, n - t * kStrip);
      if (v0[t] == v1[t]) continue;
      if (x.adjusts) adjust(x, s, w.tile, j, m, v0[t], v1[t]);
      if (x.a.extras.mask) hide(x, s, w.tile, j, m, v0[t], v1[t]);
      band(x, s, j, m, v0[t], v1[t]);
    }
    for (int g = panel; g < last; g++) softmax(x, w, j0, n, g, v0, v1, c);
    runs([&](int64_t j, int64_t m, int a0, int a1) {
      vectors(a0, a1, [&](int g, auto V) {
        tiles<V.value>(x.Dv, [&](int64_t r, auto R) {
          const U* p = column<C>(reinterpret_cast<const U*>(w.s), kKeys<T>, g) + j / kPer<T> * kPanel<C>;
          accumulate<R.value, V.value, C, U>(p, kv.v + j / kPer<T> * kv.sv + r * sizeof(U), kv.sv,
                                             (m + kPer<T> - 1) / kPer<T>, column<C>(x.o, wide(x.Dv), g) + r * kPanel<C>,
                                             x.alpha + g * L);
        });
      });
      for (int i = a0 * L; i < a1 * L; i++) x.alpha[i] = 1;  // rescaled once
    });
  }
}

// count query blocks of one sequence and kv head: from `first` in the order last block first, its heads side by side.
template <class T>
void blocks(const AttentionForward& a, const Sequence& seq, int64_t hk, int64_t group, int64_t first, int64_t count,
            bool adjusts, Workspace<T>& w) {
  using C = compute<T>;
  const int64_t D = a.q.size[3], Dv = a.v.size[3], last = (seq.Nq - 1) / kRows;
  const int64_t W = wide(D), Wv = wide(Dv);
  const Rows<T> k = rows<T>(a.k, a.extras, seq, hk), v = rows<T>(a.v, a.extras, seq, hk);
  const C scale = adjusts ? C(1) : static_cast<C>(__builtin_fabs(a.spec.scale));
  const C c = static_cast<C>(scale * 1.4426950408889634);  // turns S into base-2 units
  int64_t from = seq.Nk, to = 0;
  auto block = [&](int64_t t) {
    const int64_t i0 = (last - (first + t) / group) * kRows;
    C* const part = w.parts + t * w.part_size;
    C* const m = part + (W + Wv) * kRows;
    return Block<T>{a,
                    seq,
                    hk * group + (first + t) % group,
                    i0,
                    min<int64_t>(kRows, seq.Nq - i0),
                    D,
                    Dv,
                    seq.Nk - seq.Nq,
                    adjusts,
                    reinterpret_cast<unit<T>*>(part),
                    part + W * kRows,
                    m,
                    m + kRows,
                    m + 2 * kRows};
  };
  for (int64_t t = 0; t < count; t++) {
    const Block<T> x = block(t);
    transpose_q(x);
    memset(x.o, 0, Wv * kRows * sizeof(C));
    for (int i = 0; i < kRows; i++) x.m[i] = -kInfOf<C>, x.l[i] = 0;
    if (x.first() < x.end()) from = min(from, x.first()), to = max(to, x.end());
  }
  for (int64_t j0 = from / kKeys<T> * kKeys<T>; j0 < to; j0 += kKeys<T>) {
    const int64_t begin = max(j0, from), end = min(j0 + kKeys<T>, to);
    const Staged kv = stage(k, v, D, Dv, w, begin, end - begin);
    for (int64_t t = 0; t < count; t++) {
      const Block<T> x = block(t);
      const int64_t j = max(begin, x.first()), n = min(end, x.end()) - j;
      if (n <= 0) continue;
      attend(x, w, {kv.k + (j - begin) * kv.sk, kv.v + (j - begin) / kPer<T> * kv.sv, kv.sk, kv.sv}, j, n, c);
    }
  }
  for (int64_t t = 0; t < count; t++) finish(block(t), kBase2<T> ? static_cast<C>(kLn2) : scale);
}

template <class T>
void run(const AttentionForward& a) {
  using C = compute<T>;
  const int64_t H = a.q.size[1], Hk = a.k.size[1], D = a.q.size[3], Dv = a.v.size[3], group = Hk ? H / Hk : 1;
  const int64_t B = sequences(a.q, a.extras), W = wide(D), Wv = wide(Dv);
  const double scale = __builtin_fabs(a.spec.scale);
  const bool adjusts =
      a.extras.bias || a.extras.alibi_slopes || a.spec.softcap != 0 || scale < 1e-20 || std::is_same_v<C, double>;
  if (a.extras.cu_seqlens_q)  // rows that no sequence covers
    for (int64_t h = 0; h < H; h++)
      for (int64_t i = 0; i < a.q.size[2]; i++) {
        memset(a.o.data + (h * a.o.stride[1] + i * a.o.stride[2]) * sizeof(T), 0, Dv * sizeof(T));
        if (a.lse) reinterpret_cast<C*>(a.lse.data)[h * a.lse.stride[1] + i * a.lse.stride[2]] = -kInfOf<C>;
      }
  auto blocks_of = [&](int64_t b) { return (sequence(a.q, a.k, a.extras, b).Nq + kRows - 1) / kRows; };
  int64_t total = 0, longest = 0, tasks = 0;
  for (int64_t b = 0; b < B; b++) total += H * blocks_of(b), longest = max(longest, sequence(a.q, a.k, a.extras, b).Nk);
  if (!total) return;
  const int64_t threads = omp_get_max_threads(), part_size = (W + Wv + 3) * kRows;
  const int64_t together = clamp(min(kTogetherBytes / (part_size * int64_t(sizeof(C))),
                                     threads == 1 ? total : total / (4 * threads)),  // four tasks a thread even out
                                 1, kTogether<T>);
  struct Task {
    int64_t b, hk, first, count;
  };
  static thread_local Scratch list;
  Task* const task = static_cast<Task*>(list.bytes(total * sizeof(Task)));
  for (int64_t b = 0; b < B; b++)
    for (int64_t hk = 0; hk < Hk; hk++)
      for (int64_t n = blocks_of(b) * group, i = 0; i < n; i += together)  // a head's blocks together, heaviest first
        task[tasks++] = {b, hk, i, min(together, n - i)};
#pragma omp parallel if (tasks > 1 && total * longest * (D + Dv) > 20000)  // 10 us of work pay for the threads
  {
    static thread_local Scratch scratch;
    Workspace<T> w;
    C* at = static_cast<C*>(
        scratch.bytes(((W + Wv) * kKeys<T> + (kKeys<T> + kStrip) * kRows + together * part_size) * sizeof(C)));
    w.s = at, at += kKeys<T> * kRows;
    w.tile = at, at += kStrip * kRows;
    w.parts = at, at += together * part_size, w.part_size = part_size;
    w.v = reinterpret_cast<unit<T>*>(at), at += kKeys<T> * Wv;
    w.k = at, w.k_copy = reinterpret_cast<T*>(at);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tasks; t++)
      blocks(a, sequence(a.q, a.k, a.extras, task[t].b), task[t].hk, group, task[t].first, task[t].count, adjusts, w);
  }
}

}  // namespace attention_fwd

void attention_forward(const AttentionForward& a) {
  switch (a.q.dtype) {
    case Dtype::kFloat32:
      return attention_fwd::run<float>(a);
    case Dtype::kBFloat16:
      return attention_fwd::run<bf16>(a);
    case Dtype::kFloat16:
      return attention_fwd::run<f16>(a);
    default:
      return attention_fwd::run<double>(a);
  }
}

}  // namespace llmfast::cpu::LLMFAST_ISA
