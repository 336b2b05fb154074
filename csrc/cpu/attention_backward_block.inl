// One block of attention backward, 64 queries against 64 keys: P = exp(scale q k^T - lse), dV += P^T dO,
// dS = P (dO V^T - delta), dK += dS^T Q, dQ += dS K, with every option; dK and dQ still lack their scale.
// attention_backward.inl walks over the blocks.
//
// For S and dP lanes are keys: K^T and V^T are made once for a key block, Q and dO are broadcast from their rows. For
// dV, dK and dQ lanes are head dims: P and dS are broadcast, dO, Q and K are read row by row. So every product is one
// micro-kernel, and nothing else is transposed. Each product starts from zero and is added once per block: longer sums
// cost accuracy. Where the machine has bf16 dot products a unit is a pair: of head dims for S and dP, of queries for dV
// and dK, of keys for dQ. Other half precision is copied block by block to float32 scratch.
namespace llmfast::cpu::LLMFAST_ISA {
namespace attention_bwd {

using attention_fwd::chunk, attention_fwd::tiles, attention_fwd::vectors;

constexpr int kBlock = 64, kStrip = 16, kStrips = kBlock / kStrip;

// Queries [i0, i0 + nq) against keys [j0, j0 + nk) of one head; key j lies offset = Nk - Nq right of query j.
template <class T>
struct Block {
  const AttentionBackward& a;
  Sequence seq;
  int64_t h, i0, nq, j0, nk, offset;
};

// Rows [r0, r1) of a block, which see its strips [c0, c1) of 16 keys; not all of them where it is an edge.
struct Run {
  int r0, r1, c0, c1;
  bool edge;
};

// n rows as the products read them: broadcast from rows (a stride in bytes), or as vectors of units (a stride in
// units).
template <class U>
struct Staged {
  const char* rows;
  int64_t stride;
  const U* units;
  int64_t units_stride;
};

// Keys [j0, j0 + nk) as the products read them, and their gradients.
template <class T>
struct KeyBlock {
  int64_t j0, nk;
  unit<T>*kt, *vt;     // (D, 64) and (Dv, 64), in units
  compute<T>*dk, *dv;  // (64, D), (64, Dv)
  unit<T>* pairs;      // (32, D)
  char* copy;          // (64, D) where the rows can't be read in place
  Staged<unit<T>> rows;
};

constexpr int kTogether = 4;  // key blocks; staging queries for each alone costs 3 % of the time (bf16)
constexpr int64_t kTogetherBytes = 512 << 10;  // of key blocks, half of L2 (1 MiB on Zen 4)

template <class T>
struct Workspace {
  using C = compute<T>;
  using U = unit<T>;
  KeyBlock<T> keys[kTogether];
  int together;            // of them in use
  U *q_rows, *do_rows;     // (64, D), pairs (32, D)
  char *q_copy, *do_copy;  // (64, D) where the rows can't be read in place
  C *p, *s, *dropped;      // (64 queries, 64 keys)
  C *cap, *kept;           // the softcap's derivative; 1 / (1 - dropout_p) or 0
  U *p_pairs, *s_pairs;    // (32 query pairs, 64)
  bf16* s_rows;            // (64, 64)
  alignas(64) C lse[kBlock], delta[kBlock], bias[kBlock], mask[kBlock], low[kBlock], high[kBlock];
};

template <class T>
LLMFAST_INLINE Staged<unit<T>> stage(const T* x, int64_t stride, int64_t n, int64_t D, char* copy, unit<T>* units) {
  using C = compute<T>;
  const int64_t W = wide(D);
  if constexpr (kPairs<T>) {
    if (D % (2 * kLanes)) {
      T* to = reinterpret_cast<T*>(copy);
      for (int64_t i = 0; i < n; i++) memcpy(to + i * W, x + i * stride, D * 2), memset(to + i * W + D, 0, (W - D) * 2);
      x = to, stride = W;
    }
    if (units)
      for (int64_t i = 0; i < n; i += 2)
        for (int64_t d = 0; d < W; d += 2 * kLanes) {
          const int32_t* at = reinterpret_cast<const int32_t*>(x + i * stride + d);
          ivec low, high;
          interleave(loadu(at), i + 1 < n ? loadu(reinterpret_cast<const int32_t*>(x + (i + 1) * stride + d)) : ivec{},
                     low, high);
          store(units + i / 2 * W + d, low), store(units + i / 2 * W + d + kLanes, high);
        }
    return {reinterpret_cast<const char*>(x), stride * 2, units, W};
  } else {
    if constexpr (std::is_same_v<T, C>)
      if (D % kLanesOf<C> == 0) return {reinterpret_cast<const char*>(x), stride * int64_t(sizeof(C)), x, stride};
    C* to = reinterpret_cast<C*>(copy);
    for (int64_t i = 0; i < n; i++) widen(x + i * stride, D, to + i * W);
    return {copy, W * int64_t(sizeof(C)), to, W};
  }
}

// (n, units) -> (units, 64), rows past n are zero
template <class U>
void transpose_rows(const Staged<U>& x, int64_t n, int64_t units, U* to) {
  using V = decltype(load(to));
  constexpr int L = sizeof(V) / sizeof(U);
  for (int64_t g = 0; g < kBlock; g += L)
    for (int64_t d = 0; d < units; d += L) {
      V r[L];
      LLMFAST_UNROLL
      for (int i = 0; i < L; i++)
        r[i] = g + i < n ? loadu(reinterpret_cast<const U*>(x.rows + (g + i) * x.stride) + d) : V{};
      transpose(r);
      LLMFAST_UNROLL
      for (int i = 0; i < L; i++) store(to + (d + i) * kBlock + g, r[i]);
    }
}

// acc[r][v] = sum over k of a[r ar + k ak] * b[k bk + v]: R rows x V vectors; strides of a in bytes
template <int R, int V, class C, class U, class F>
LLMFAST_INLINE void product(const char* a, int64_t ar, int64_t ak, const U* b, int64_t bk, int64_t n, F&& finish) {
  vec_of<C> acc[R][V];
  LLMFAST_UNROLL
  for (int r = 0; r < R; r++) LLMFAST_UNROLL
  for (int v = 0; v < V; v++) acc[r][v] = vec_of<C>{};
  for (int64_t k = 0; k < n; k++) {
    decltype(load(b)) y[V];
    LLMFAST_UNROLL
    for (int v = 0; v < V; v++) y[v] = loadu(b + k * bk + v * kLanesOf<C>);
    LLMFAST_UNROLL
    for (int r = 0; r < R; r++) multiply_add_row<C, U>(acc[r], a + r * ar + k * ak, y);
  }
  finish(acc);
}

// c (rows, D) += a b
template <class C, class U>
__attribute__((noinline)) void add_product(C* c, int64_t sc, int64_t rows, int64_t D, const char* a, int64_t ar,
                                           int64_t ak, const U* b, int64_t bk, int64_t n) {
  constexpr int L = kLanesOf<C>;
  vectors(0, static_cast<int>((D + L - 1) / L), [&](int g, auto V) {
    tiles<V.value>(rows, [&](int64_t r, auto R) {
      product<R.value, V.value, C>(a + r * ar, ar, ak, b + g * L, bk, n, [&](auto& acc) {
        C* to = c + r * sc + g * L;
        LLMFAST_UNROLL
        for (int i = 0; i < R.value; i++) LLMFAST_UNROLL
        for (int v = 0; v < V.value; v++) storeu(to + i * sc + v * L, loadu(to + i * sc + v * L) + acc[i][v]);
      });
    });
  });
}

// exp(s scale - lse). To 2.6e-6 where P and dS are rounded to 16 bits, with the product by log2(e) in the two factors.
template <class T>
LLMFAST_INLINE vec_of<compute<T>> probability(vec_of<compute<T>> s, compute<T> scale, compute<T> lse) {
  if constexpr (std::is_same_v<T, double>) {
    return exp2(s * scale - lse, 1.4426950408889634);
  } else if constexpr (sizeof(T) == 2) {
    return exp2_coarse(s * (scale * kLog2e) - lse * kLog2e, 1.f);
  } else {
    return exp(s * scale - lse);
  }
}

// The first and last key of a block that each row sees.
template <class T>
void band(const Block<T>& x, Workspace<T>& w) {
  using C = compute<T>;
  for (int64_t r = 0; r < x.nq; r++) {
    const int64_t diagonal = x.i0 + r + x.offset - x.j0;
    w.low[r] = static_cast<C>(clamp(diagonal - x.a.spec.left, 0, kBlock));
    w.high[r] = static_cast<C>(min(clamp(diagonal + x.a.spec.right, -1, kBlock), x.nk - 1));
  }
}

// y for the keys of vector v that query row sees, 0 for the others
template <class T>
LLMFAST_INLINE vec_of<compute<T>> visible(const Workspace<T>& w, int64_t row, int v, vec_of<compute<T>> y) {
  using C = compute<T>;
  const vec_of<C> key = iota<C>() + static_cast<C>(v * kLanesOf<C>);
  return (key < w.low[row]) | (key > w.high[row]) ? vec_of<C>{} : y;
}

enum Pass { kSum, kWeights, kGradients };

// R rows x V vectors of a run: kSum adds a b to S; kWeights makes P of scale (S + a b), kGradients dS / scale of dP =
// a b, with what the products that follow read of them.
template <Pass kPass, int R, int V, class T>
LLMFAST_INLINE void score_tile(const Block<T>& x, Workspace<T>& w, const Run& run, const Staged<unit<T>>& a,
                               const unit<T>* b, compute<T>* sums, int64_t first, int64_t units, int64_t row, int g) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  const C scale = static_cast<C>(x.a.spec.scale);
  product<R, V, C>(a.rows + row * a.stride + first * int64_t(sizeof(*b)), a.stride, sizeof(*b),
                   b + first * kBlock + g * L, kBlock, units, [&](auto& acc) {
                     auto each = [&](auto&& f) __attribute__((always_inline)) {
                       LLMFAST_UNROLL
                       for (int i = 0; i < R; i++) LLMFAST_UNROLL
                       for (int v = 0; v < V; v++) acc[i][v] = f(acc[i][v], i, v, (row + i) * kBlock + (g + v) * L);
                     };
                     if (first) each([&](auto y, int, int, int64_t at) { return load(sums + at) + y; });
                     if constexpr (kPass == kWeights)
                       each([&](auto y, int i, int, int64_t) { return probability<T>(y, scale, w.lse[row + i]); });
                     if constexpr (kPass == kGradients)
                       each([&](auto y, int i, int, int64_t at) { return load(w.p + at) * (y - w.delta[row + i]); });
                     if (kPass != kSum && run.edge)
                       each([&](auto y, int i, int v, int64_t) { return visible(w, row + i, g + v, y); });
                     if constexpr (!(kPairs<T> && kPass == kGradients))
                       each([&](auto y, int, int, int64_t at) { return store(sums + at, y), y; });
                     if constexpr (kPairs<T> && kPass != kSum) LLMFAST_UNROLL
                     for (int i = 0; i < R; i += 2) LLMFAST_UNROLL
                     for (int v = 0; v < V; v++) {
                       constexpr bool kTwo = R > 1;
                       const Rounded both = rounded(acc[i][v], kTwo ? acc[i + kTwo][v] : vec{});
                       store((kPass == kWeights ? w.p_pairs : w.s_pairs) + (row + i) / 2 * kBlock + (g + v) * L,
                             both.pairs());
                       if constexpr (kPass == kGradients) {
                         both.store_first(w.s_rows + (row + i) * kBlock + (g + v) * L);
                         if (kTwo) both.store_second(w.s_rows + (row + i + 1) * kBlock + (g + v) * L);
                       }
                     }
                   });
}

// Calls f<R, V>(row, first vector) over the tiles of a run.
template <class C, class F>
LLMFAST_INLINE void tiles_of(const Run& run, F&& f) {
  constexpr int kVectors = kStrip / kLanesOf<C>;
  vectors(run.c0 * kVectors, run.c1 * kVectors,
          [&](int g, auto V) { tiles<V.value>(run.r1 - run.r0, [&](int64_t r, auto R) { f(run.r0 + r, g, R, V); }); });
}

template <Pass kPass, class T>
void scores(const Block<T>& x, Workspace<T>& w, const Run& run, const Staged<unit<T>>& a, const unit<T>* b,
            compute<T>* sums, int64_t first, int64_t units) {
  tiles_of<compute<T>>(run, [&](int64_t row, int g, auto R, auto V) {
    score_tile<kPass, R.value, V.value>(x, w, run, a, b, sums, first, units, row, g);
  });
}

// n elements of a row of a mask or bias, widened
template <class E, class C>
LLMFAST_INLINE void row_of(const E* p, int64_t stride, int64_t n, C* to) {
  if constexpr (std::is_same_v<C, float> && !std::is_same_v<E, double>)
    if (stride == 1) {
      int64_t j = 0;
      for (; j + kLanes <= n; j += kLanes) store(to + j, loadu(p + j));
      if (j < n) store(to + j, load_part(p + j, n - j));
      return;
    }
  for (int64_t j = 0; j < n; j++) to[j] = static_cast<C>(to_float(p[j * stride]));
}
template <class C>
LLMFAST_INLINE void row_of(const Tensor& t, int64_t at, int64_t n, C* to) {
  const int64_t stride = t.stride[3];
  switch (t.dtype) {
    case Dtype::kFloat32:
      return row_of(reinterpret_cast<const float*>(t.data) + at, stride, n, to);
    case Dtype::kBFloat16:
      return row_of(reinterpret_cast<const bf16*>(t.data) + at, stride, n, to);
    case Dtype::kFloat16:
      return row_of(reinterpret_cast<const f16*>(t.data) + at, stride, n, to);
    case Dtype::kBool:
      return row_of(reinterpret_cast<const uint8_t*>(t.data) + at, stride, n, to);
    default:
      return row_of(reinterpret_cast<const double*>(t.data) + at, stride, n, to);
  }
}

// What dropout leaves of a row's 64 keys: 1 / (1 - p) or 0.
template <class T>
LLMFAST_INLINE void keep_row(const Block<T>& x, int64_t row, compute<T>* kept) {
  using C = compute<T>;
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  const double p = x.a.spec.dropout_p;
  const C inverse = p < 1 ? static_cast<C>(1 / (1 - p)) : C(0);
  const uint32_t threshold = static_cast<uint32_t>(p < 1 ? p * 4294967296. : 0);
  const uint64_t key = static_cast<uint64_t>(*reinterpret_cast<const int64_t*>(x.a.extras.seed.data));
  for (int j = 0; j < kBlock; j += 4 * kLanes) {
    wvec c[4] = {(wvec)iota<int32_t>() + static_cast<uint32_t>((x.j0 + j) / 4),
                 wvec{} + static_cast<uint32_t>(x.i0 + row), wvec{} + static_cast<uint32_t>(x.h),
                 wvec{} + static_cast<uint32_t>(x.seq.b)};
    philox(c, key);
    const wvec even[2] = {zip_low(c[0], c[2], lanes), zip_high(c[0], c[2], lanes)};
    const wvec odd[2] = {zip_low(c[1], c[3], lanes), zip_high(c[1], c[3], lanes)};
    for (int i = 0; i < 4; i++) {
      const wvec words = i % 2 ? zip_high(even[i / 2], odd[i / 2], lanes) : zip_low(even[i / 2], odd[i / 2], lanes);
      for (int lane = 0; lane < kLanes; lane++) kept[j + i * kLanes + lane] = words[lane] >= threshold ? inverse : C(0);
    }
  }
}

// P of the sums in w.p, with every option: softcap, bias, ALiBi, mask, band, dropout.
template <class T>
void weights(const Block<T>& x, Workspace<T>& w, const Run& run) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  const AttentionSpec& spec = x.a.spec;
  const Extras& e = x.a.extras;
  const C scale = static_cast<C>(spec.scale), cap = static_cast<C>(spec.softcap);
  const Tensor& slopes = e.alibi_slopes;
  const C slope = slopes ? element<C>(slopes, slopes.dim == 2 ? x.seq.b * slopes.stride[0] + x.h * slopes.stride[1]
                                                              : x.h * slopes.stride[0])
                         : C(0);
  auto start = [&](const Tensor& t, int64_t r) {
    return x.seq.b * t.stride[0] + x.h * t.stride[1] + (x.i0 + r) * t.stride[2] + x.j0 * t.stride[3];
  };
  for (int64_t r = run.r0; r < run.r1; r++) {
    if (e.bias) row_of(e.bias, start(e.bias, r), x.nk, w.bias);
    if (e.mask) row_of(e.mask, start(e.mask, r), x.nk, w.mask);
    if (spec.dropout_p != 0) keep_row(x, r, w.kept + r * kBlock);
    for (int g = run.c0 * kStrip / L; g < run.c1 * kStrip / L; g++) {
      const int64_t at = r * kBlock + g * L;
      vec_of<C> y = load(w.p + at) * scale;
      if (cap != 0) {
        const vec_of<C> t = tanh(y * (1 / cap));
        store(w.cap + at, 1 - t * t);
        y = t * cap;
      }
      if (e.bias) y += load(w.bias + g * L);
      if (slopes) y -= abs(iota<C>() + static_cast<C>(x.j0 + g * L - x.i0 - r - x.offset)) * slope;
      y = probability<T>(y, 1, w.lse[r]);
      if (e.mask) y = load(w.mask + g * L) == 0 ? vec_of<C>{} : y;
      if (run.edge) y = visible(w, r, g, y);
      store(w.p + at, y);
      if (spec.dropout_p != 0) {
        const vec_of<C> kept = load(w.kept + at);
        store(w.dropped + at, kept == 0 ? vec_of<C>{} : y * kept);
      }
    }
  }
}

// dS / scale of P and of dP in w.s, with every option; dbias.
template <class T>
void gradients(const Block<T>& x, Workspace<T>& w, const Run& run) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  const AttentionSpec& spec = x.a.spec;
  const Tensor& db = x.a.dbias;
  for (int64_t r = run.r0; r < run.r1; r++) {
    C* const ds = w.s + r * kBlock;
    for (int g = run.c0 * kStrip / L; g < run.c1 * kStrip / L; g++) {
      const int64_t at = r * kBlock + g * L;
      vec_of<C> dp = load(w.s + at), p = load(w.p + at);
      if (spec.dropout_p != 0) {
        const vec_of<C> kept = load(w.kept + at);
        dp = kept == 0 ? vec_of<C>{} : dp * kept;
      }
      store(w.s + at, p == 0 ? vec_of<C>{} : p * (dp - w.delta[r]));
    }
    if (db) {
      C* to = reinterpret_cast<C*>(db.data) + x.seq.b * db.stride[0] + x.h * db.stride[1] + (x.i0 + r) * db.stride[2] +
              x.j0 * db.stride[3];
      const int64_t end = min<int64_t>(run.c1 * kStrip, x.nk), step = db.stride[3];
      if (step) {
        for (int64_t j = run.c0 * kStrip; j < end; j++) to[j * step] += ds[j];
      } else {
        C sum = 0;
        for (int64_t j = run.c0 * kStrip; j < end; j++) sum += ds[j];
        *to += sum;
      }
    }
    if (spec.softcap != 0)
      for (int g = run.c0 * kStrip / L; g < run.c1 * kStrip / L; g++)
        store(ds + g * L, load(ds + g * L) * load(w.cap + r * kBlock + g * L));
  }
  if constexpr (kPairs<T>) {
    const C* p = spec.dropout_p != 0 ? w.dropped : w.p;
    for (int64_t r = run.r0; r < run.r1; r += 2)
      for (int g = run.c0 * kStrip / L; g < run.c1 * kStrip / L; g++) {
        const int64_t at = r * kBlock + g * L, next = at + kBlock;
        const bool two = r + 1 < run.r1;
        store(w.p_pairs + r / 2 * kBlock + g * L, pairs(load(p + at), two ? load(p + next) : vec{}));
        store(w.s_pairs + r / 2 * kBlock + g * L, pairs(load(w.s + at), two ? load(w.s + next) : vec{}));
        storeu(w.s_rows + at, load(w.s + at));
        if (two) storeu(w.s_rows + next, load(w.s + next));
      }
  }
}

// The runs of rows of a block that see the same strips.
template <class T>
int runs_of(const Block<T>& x, Run (&runs)[kStrips]) {
  int count = 0;
  for (int r = 0; r < x.nq; r += kStrip) {
    const int r1 = static_cast<int>(min<int64_t>(r + kStrip, x.nq));
    const int64_t diagonal = x.i0 + r + x.offset - x.j0, span = r1 - 1 - r;
    const int64_t low = diagonal - x.a.spec.left, high = diagonal + x.a.spec.right + 1;  // row r sees [low, high)
    const int c0 = static_cast<int>(clamp(low, 0, x.nk) / kStrip),
              c1 = static_cast<int>((clamp(high + span, 0, x.nk) + kStrip - 1) / kStrip);
    if (c1 <= c0) continue;
    const bool edge = low + span > c0 * kStrip || high < c1 * kStrip || x.nk < c1 * kStrip;
    Run* last = count ? runs + count - 1 : nullptr;
    if (last && last->r1 == r && last->c0 == c0 && last->c1 == c1 && last->edge == edge) {
      last->r1 = r1;
    } else {
      runs[count++] = {r, r1, c0, c1, edge};
    }
  }
  return count;
}

// One block: adds to k's dk and dv, and to dq (rows of stride sdq, from query i0).
template <class T>
void block(const Block<T>& x, Workspace<T>& w, const Staged<unit<T>>& qs, const Staged<unit<T>>& dos,
           const KeyBlock<T>& k, bool adjusts, compute<T>* dq, int64_t sdq) {
  using C = compute<T>;
  using U = unit<T>;
  const int64_t D = x.a.q.size[3], Dv = x.a.v.size[3];
  Run runs[kStrips];
  const int count = runs_of(x, runs);
  bool edge = false;
  for (int t = 0; t < count; t++) edge |= runs[t].edge;
  if (edge) band(x, w);
  const int64_t units = (D + kPer<T> - 1) / kPer<T>, units_v = (Dv + kPer<T> - 1) / kPer<T>, step = chunk<C>(x.seq.Nq);
  for (int t = 0; t < count; t++) {
    const Run& run = runs[t];
    if (!adjusts && units <= step && D <= 64 && Dv <= 64) {  // K^T and V^T fit L1 together, and P stays there
      tiles_of<C>(run, [&](int64_t row, int g, auto R, auto V) {
        score_tile<kWeights, R.value, V.value>(x, w, run, qs, k.kt, w.p, 0, units, row, g);
        score_tile<kGradients, R.value, V.value>(x, w, run, dos, k.vt, w.s, 0, units_v, row, g);
      });
      continue;
    }
    int64_t d = 0;
    for (; d + step < units; d += step) scores<kSum>(x, w, run, qs, k.kt, w.p, d, step);
    if (adjusts) {
      scores<kSum>(x, w, run, qs, k.kt, w.p, d, units - d);
      weights(x, w, run);
      scores<kSum>(x, w, run, dos, k.vt, w.s, 0, units_v);
      gradients(x, w, run);
    } else {
      scores<kWeights>(x, w, run, qs, k.kt, w.p, d, units - d);
      scores<kGradients>(x, w, run, dos, k.vt, w.s, 0, units_v);
    }
  }
  // dV and dK: neighbouring strips that the same rows see go together
  const C* p = x.a.spec.dropout_p != 0 ? w.dropped : w.p;
  const char* pc = reinterpret_cast<const char*>(kPairs<T> ? reinterpret_cast<const C*>(w.p_pairs) : p);
  const char* sc = reinterpret_cast<const char*>(kPairs<T> ? reinterpret_cast<const C*>(w.s_pairs) : w.s);
  int begin[kStrips], end[kStrips];
  const int strips = static_cast<int>((x.nk + kStrip - 1) / kStrip);
  for (int c = 0; c < strips; c++) {
    begin[c] = end[c] = 0;
    for (int t = 0; t < count; t++)
      if (runs[t].c0 <= c && c < runs[t].c1) {
        if (!end[c]) begin[c] = runs[t].r0;
        end[c] = runs[t].r1;
      }
  }
  for (int c = 0, u; c < strips; c = u) {
    for (u = c + 1; u < strips && begin[u] == begin[c] && end[u] == end[c];) u++;
    if (end[c] <= begin[c]) continue;
    const int64_t j = c * kStrip, keys = min<int64_t>(u * kStrip, x.nk) - j;
    const int64_t from = begin[c] / kPer<T>, n = (end[c] + kPer<T> - 1) / kPer<T> - from,
                  skip = (from * kBlock + j) * sizeof(U);
    add_product(k.dv + j * wide(Dv), wide(Dv), keys, Dv, pc + skip, sizeof(U), kBlock * sizeof(U),
                dos.units + from * dos.units_stride, dos.units_stride, n);
    add_product(k.dk + j * wide(D), wide(D), keys, D, sc + skip, sizeof(U), kBlock * sizeof(U),
                qs.units + from * qs.units_stride, qs.units_stride, n);
  }
  const char* rows = kPairs<T> ? reinterpret_cast<const char*>(w.s_rows) : sc;
  const int64_t row_bytes = kBlock * (kPairs<T> ? 2 : sizeof(C));
  for (int t = 0; t < count; t++) {
    const Run& run = runs[t];
    const int64_t from = run.c0 * kStrip / kPer<T>, to = (min<int64_t>(run.c1 * kStrip, x.nk) + kPer<T> - 1) / kPer<T>;
    add_product(dq + run.r0 * sdq, sdq, run.r1 - run.r0, D, rows + run.r0 * row_bytes + from * int64_t(sizeof(U)),
                row_bytes, sizeof(U), k.rows.units + from * k.rows.units_stride, k.rows.units_stride, to - from);
  }
}

}  // namespace attention_bwd
}  // namespace llmfast::cpu::LLMFAST_ISA
