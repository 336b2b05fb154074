// Attention forward, o = softmax(scale q k^T) v, flash form with SIMD lanes over queries.
//
// One task is kRows = 64 queries of one (batch, head). q is transposed once; k is broadcast element by element straight from
// memory, so it is never packed; maxima, sums and rescaling are vertical. |scale| * log2(e) enters with the exponential as one
// fused multiply-add, its sign with q. Keys come in blocks of kKeys = 96: with D = 64, S 24 KiB + Q 16 + O 16 stay in L2.
namespace llmfast::cpu::LLMFAST_ISA {
namespace attention_fwd {

constexpr int kRows = 64, kKeys = 96, kStrip = 16;
constexpr int kVectors = kRows / kLanes;               // vectors across the queries of a block
constexpr int kTileV = kLanes == 16 ? 4 : 2;           // AVX-512: 6 x 4 of 32 registers; AVX2 and SSE: 6 x 2 of 16
constexpr int kTileR = 6;

// Rows [i0, i0 + nq) of one sequence of one head.
struct Task {
  int64_t sequence, i0, weight;
};

template <class T>
struct Block {
  const T *q, *k, *v;
  T* o;
  void* lse;
  int64_t sqn, skn, svn, son, slse, skd, svd;
  int64_t Nq, Nk, D, Dv, i0, nq;
  int64_t b, h;
};

struct Workspace {
  float *qt, *s, *o, *k, *v;  // (D, 64), (96, 64), (Dv, 64), (96, D), (96, Dv)
  alignas(64) float m[kRows], l[kRows], alpha[kRows];
};

// S[r][v] = sum over d of k[r][d] * qt[d][v]: R keys x V vectors of queries
template <int R, int V>
LLMFAST_INLINE void scores(const float* qt, const float* k, int64_t sk, int64_t D, float* s) {
  vec acc[R][V];
  LLMFAST_UNROLL for (int r = 0; r < R; r++) LLMFAST_UNROLL for (int v = 0; v < V; v++) acc[r][v] = vec{};
  for (int64_t d = 0; d < D; d++) {
    vec q[V];
    LLMFAST_UNROLL for (int v = 0; v < V; v++) q[v] = load(qt + d * kRows + v * kLanes);
    LLMFAST_UNROLL for (int r = 0; r < R; r++) {
      vec x = splat(k[r * sk + d]);
      LLMFAST_UNROLL for (int v = 0; v < V; v++) acc[r][v] += x * q[v];
    }
  }
  LLMFAST_UNROLL for (int r = 0; r < R; r++)
      LLMFAST_UNROLL for (int v = 0; v < V; v++) store(s + r * kRows + v * kLanes, acc[r][v]);
}

// O[r][v] = O[r][v] * alpha[v] + sum over j of v[j][r] * P[j][v]: R head dims x V vectors of queries
template <int R, int V>
LLMFAST_INLINE void accumulate(const float* p, const float* v, int64_t sv, int64_t n, float* o, const float* alpha) {
  vec acc[R][V];
  LLMFAST_UNROLL for (int r = 0; r < R; r++)
      LLMFAST_UNROLL for (int x = 0; x < V; x++) acc[r][x] = load(o + r * kRows + x * kLanes) * load(alpha + x * kLanes);
  for (int64_t j = 0; j < n; j++) {
    vec w[V];
    LLMFAST_UNROLL for (int x = 0; x < V; x++) w[x] = load(p + j * kRows + x * kLanes);
    LLMFAST_UNROLL for (int r = 0; r < R; r++) {
      vec y = splat(v[j * sv + r]);
      LLMFAST_UNROLL for (int x = 0; x < V; x++) acc[r][x] += y * w[x];
    }
  }
  LLMFAST_UNROLL for (int r = 0; r < R; r++)
      LLMFAST_UNROLL for (int x = 0; x < V; x++) store(o + r * kRows + x * kLanes, acc[r][x]);
}

template <int V>
LLMFAST_INLINE void scores_rows(const float* qt, const float* k, int64_t sk, int64_t D, float* s, int64_t n) {
  constexpr int R = V == 1 ? 16 : V == 2 && kTileV == 4 ? 12 : V == 3 ? 8 : kTileR;
  int64_t j = 0;
  for (; j + R <= n; j += R) scores<R, V>(qt, k + j * sk, sk, D, s + j * kRows);
  for (; j + 2 <= n; j += 2) scores<2, V>(qt, k + j * sk, sk, D, s + j * kRows);
  if (j < n) scores<1, V>(qt, k + j * sk, sk, D, s + j * kRows);
}

template <int V>
LLMFAST_INLINE void accumulate_rows(const float* p, const float* v, int64_t sv, int64_t n, float* o, const float* alpha,
                                    int64_t Dv) {
  constexpr int R = V == 1 ? 16 : V == 2 && kTileV == 4 ? 12 : V == 3 ? 8 : kTileR;
  int64_t d = 0;
  for (; d + R <= Dv; d += R) accumulate<R, V>(p, v + d, sv, n, o + d * kRows, alpha);
  for (; d + 2 <= Dv; d += 2) accumulate<2, V>(p, v + d, sv, n, o + d * kRows, alpha);
  if (d < Dv) accumulate<1, V>(p, v + d, sv, n, o + d * kRows, alpha);
}

// Calls f<V>(first vector) over the vectors [v0, v1) in register tiles.
template <class F>
LLMFAST_INLINE void vectors(int v0, int v1, F&& f) {
  for (; v1 - v0 >= kTileV; v0 += kTileV) f(v0, std::integral_constant<int, kTileV>{});
  if constexpr (kTileV == 4) {
    if (v1 - v0 == 3) f(v0, std::integral_constant<int, 3>{});
    if (v1 - v0 == 2) f(v0, std::integral_constant<int, 2>{});
  }
  if (v1 - v0 == 1) f(v0, std::integral_constant<int, 1>{});
}

// Scale, bias and mask over the scores of keys [j0, j0 + n); lanes are queries.
LLMFAST_INLINE float element(const Tensor& t, int64_t at) {
  switch (t.dtype) {
    case Dtype::kFloat32: return reinterpret_cast<const float*>(t.data)[at];
    case Dtype::kBFloat16: return to_float(reinterpret_cast<const bf16*>(t.data)[at]);
    case Dtype::kFloat16: return to_float(reinterpret_cast<const f16*>(t.data)[at]);
    default: return static_cast<float>(reinterpret_cast<const double*>(t.data)[at]);
  }
}

template <class T>
void adjust(const AttentionForward& a, const Block<T>& x, float* s, int64_t j0, int64_t n, float scale) {
  const Tensor &bias = a.extras.bias, &mask = a.extras.mask;
  const char* hidden = mask ? mask.data + x.b * mask.stride[0] + x.h * mask.stride[1] : nullptr;
  int64_t at = bias ? x.b * bias.stride[0] + x.h * bias.stride[1] : 0;
  for (int64_t j = 0; j < n; j++)
    for (int64_t i = 0; i < x.nq; i++) {
      float y = s[j * kRows + i] * scale;
      if (bias) y += element(bias, at + (x.i0 + i) * bias.stride[2] + (j0 + j) * bias.stride[3]);
      if (hidden && !hidden[(x.i0 + i) * mask.stride[2] + (j0 + j) * mask.stride[3]]) y = -kInf;
      s[j * kRows + i] = y;
    }
}

// The band's edges: hides keys outside [first, last] for each query of one strip of keys.
template <class T>
LLMFAST_INLINE void band(const AttentionSpec& spec, const Block<T>& x, float* s, int64_t j0, int64_t n, int v0, int v1) {
  const int64_t offset = x.Nk - x.Nq;
  for (int64_t j = 0; j < n; j++)
    for (int v = v0; v < v1; v++) {
      float* p = s + j * kRows + v * kLanes;
      for (int lane = 0; lane < kLanes; lane++) {
        int64_t distance = j0 + j - (x.i0 + v * kLanes + lane) - offset;
        if (distance > spec.right || distance < -spec.left) p[lane] = -kInf;
      }
    }
}

template <class T>
void block(const AttentionForward& a, const Block<T>& x, Workspace& w) {
  const AttentionSpec& spec = a.spec;
  const int64_t offset = x.Nk - x.Nq, D = x.D, Dv = x.Dv;
  const bool adjusts = a.extras.bias || a.extras.mask || spec.scale == 0;
  const float scale = static_cast<float>(__builtin_fabs(spec.scale)), sign = spec.scale < 0 ? -1.f : 1.f;
  const float c = adjusts ? kLog2e : scale * kLog2e;  // what turns the scores in S into base-2 units
  for (int64_t i = 0; i < kRows; i++)
    for (int64_t d = 0; d < D; d++)
      w.qt[d * kRows + i] = i < x.nq ? to_float(x.q[(x.i0 + i) * x.sqn + d]) * sign : 0.f;
  memset(w.o, 0, Dv * kRows * 4);
  for (int i = 0; i < kRows; i++) w.m[i] = -kInf, w.l[i] = 0.f;

  // Keys some query sees, and the part that all see.
  const int64_t first = max<int64_t>(0, x.i0 + offset - spec.left), last_row = x.i0 + x.nq - 1;
  const int64_t end = min(x.Nk, last_row + offset + spec.right + 1);
  const int64_t whole0 = max(first, last_row + offset - spec.left), whole1 = min(end, x.i0 + offset + spec.right + 1);
  const int used = static_cast<int>((x.nq + kLanes - 1) / kLanes);

  for (int64_t j0 = first; j0 < end;) {
    const bool whole = j0 >= whole0 && j0 < whole1;
    int64_t n = min<int64_t>(kKeys, (whole ? whole1 : j0 < whole0 ? min(whole0, end) : end) - j0);
    // Strips of kStrip keys, each with the vectors [v0, v1) that see one of its keys.
    int v0[kKeys / kStrip], v1[kKeys / kStrip];
    const int strips = static_cast<int>((n + kStrip - 1) / kStrip);
    for (int t = 0; t < strips; t++) {
      int64_t a0 = j0 + t * kStrip, a1 = min<int64_t>(a0 + kStrip, j0 + n) - 1;  // its first and last key
      int64_t i_low = a0 - offset - spec.right - x.i0, i_high = a1 - offset + spec.left - x.i0;
      v0[t] = whole ? 0 : static_cast<int>(min<int64_t>(max<int64_t>(i_low, 0) / kLanes, used));
      v1[t] = whole ? used : static_cast<int>(max<int64_t>(v0[t], min<int64_t>(used, i_high / kLanes + 1)));
    }
    const float *k, *v;
    int64_t sk, sv;
    if constexpr (std::is_same_v<T, float>) {
      k = x.k + j0 * x.skn, v = x.v + j0 * x.svn, sk = x.skn, sv = x.svn;
    } else {
      for (int64_t j = 0; j < n; j++) {
        for (int64_t d = 0; d < D; d++) w.k[j * D + d] = to_float(x.k[(j0 + j) * x.skn + d]);
        for (int64_t d = 0; d < Dv; d++) w.v[j * Dv + d] = to_float(x.v[(j0 + j) * x.svn + d]);
      }
      k = w.k, v = w.v, sk = D, sv = Dv;
    }
    // Runs of strips with the same vectors go together.
    auto runs = [&](auto&& f) {
      for (int t = 0; t < strips;) {
        int u = t + 1;
        while (u < strips && v0[u] == v0[t] && v1[u] == v1[t]) u++;
        f(t * kStrip, min<int64_t>(u * kStrip, n) - t * kStrip, v0[t], v1[t]);
        t = u;
      }
    };
    runs([&](int64_t j, int64_t m, int a0, int a1) {
      vectors(a0, a1, [&](int g, auto V) {
        scores_rows<V.value>(w.qt + g * kLanes, k + j * sk, sk, D, w.s + j * kRows + g * kLanes, m);
      });
    });
    if (adjusts) adjust(a, x, w.s, j0, n, scale);
    if (!whole)
      for (int t = 0; t < strips; t++)
        band(spec, x, w.s + t * kStrip * kRows, j0 + t * kStrip, min<int64_t>(kStrip, n - t * kStrip), v0[t], v1[t]);
    for (int g = 0; g < used; g++) {
      const int64_t lane = g * kLanes;
      vec m_old = load(w.m + lane), m_new = m_old, sum = vec{};
      for (int t = 0; t < strips; t++)
        if (v0[t] <= g && g < v1[t])
          for (int64_t j = t * kStrip; j < min<int64_t>((t + 1) * kStrip, n); j++) m_new = max(m_new, load(w.s + j * kRows + lane));
      vec mc = (m_new == -kInf ? vec{} : m_new) * c;  // no key yet: 0
      vec alpha = exp2(m_old * c - mc);
      for (int t = 0; t < strips; t++)
        if (v0[t] <= g && g < v1[t])
          for (int64_t j = t * kStrip; j < min<int64_t>((t + 1) * kStrip, n); j++) {
            vec p = exp2(load(w.s + j * kRows + lane) * c - mc);
            sum += p;
            store(w.s + j * kRows + lane, p);
          }
      store(w.m + lane, m_new);
      store(w.alpha + lane, alpha);
      store(w.l + lane, load(w.l + lane) * alpha + sum);
    }
    runs([&](int64_t j, int64_t m, int a0, int a1) {
      vectors(a0, a1, [&](int g, auto V) {
        accumulate_rows<V.value>(w.s + j * kRows + g * kLanes, v + j * sv, sv, m, w.o + g * kLanes, w.alpha + g * kLanes, Dv);
      });
      for (int i = a0 * kLanes; i < a1 * kLanes; i++) w.alpha[i] = 1.f;  // rescaled once
    });
    j0 += n;
  }
  for (int64_t i = 0; i < x.nq; i++) {
    const float l = w.l[i], inverse = l == 0.f ? 0.f : 1.f / l;
    T* o = x.o + (x.i0 + i) * x.son;
    for (int64_t d = 0; d < Dv; d++) from_float(o + d, w.o[d * kRows + i] * inverse);
    if (x.lse)
      static_cast<float*>(x.lse)[(x.i0 + i) * x.slse] = l == 0.f ? -kInf : w.m[i] * (adjusts ? 1.f : scale) + __builtin_logf(l);
  }
}

template <class T>
void run(const AttentionForward& a) {
  const int64_t B = a.q.size[0], H = a.q.size[1], Nq = a.q.size[2], Nk = a.k.size[2], D = a.q.size[3], Dv = a.v.size[3];
  const int64_t group = a.k.size[1] ? H / a.k.size[1] : 1, blocks = (Nq + kRows - 1) / kRows, tasks = B * H * blocks;
  if (!tasks) return;
#pragma omp parallel if (tasks > 1)
  {
    static thread_local Scratch scratch;
    Workspace w;
    w.qt = scratch.floats((D + Dv) * (kRows + kKeys) + kKeys * kRows);
    w.s = w.qt + D * kRows, w.o = w.s + kKeys * kRows, w.k = w.o + Dv * kRows, w.v = w.k + kKeys * D;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tasks; t++) {
      const int64_t i = blocks - 1 - t / (B * H), b = t % (B * H) / H, h = t % H;  // heaviest first when causal
      auto at = [&](const Tensor& x, int64_t head) { return b * x.stride[0] + head * x.stride[1]; };
      Block<T> x;
      x.q = reinterpret_cast<const T*>(a.q.data) + at(a.q, h);
      x.k = reinterpret_cast<const T*>(a.k.data) + at(a.k, h / group);
      x.v = reinterpret_cast<const T*>(a.v.data) + at(a.v, h / group);
      x.o = reinterpret_cast<T*>(a.o.data) + at(a.o, h);
      x.lse = a.lse ? reinterpret_cast<float*>(a.lse.data) + at(a.lse, h) : nullptr;
      x.sqn = a.q.stride[2], x.skn = a.k.stride[2], x.svn = a.v.stride[2], x.son = a.o.stride[2], x.slse = a.lse.stride[2];
      x.Nq = Nq, x.Nk = Nk, x.D = D, x.Dv = Dv, x.i0 = i * kRows, x.nq = min<int64_t>(kRows, Nq - x.i0);
      x.b = b, x.h = h;
      block(a, x, w);
    }
  }
}

}  // namespace attention_fwd

void attention_forward(const AttentionForward& a) {
  switch (a.q.dtype) {
    case Dtype::kFloat32: return attention_fwd::run<float>(a);
    case Dtype::kBFloat16: return attention_fwd::run<bf16>(a);
    case Dtype::kFloat16: return attention_fwd::run<f16>(a);
    default: return;  // llmfast/backends/cpu.py refuses the rest
  }
}

}  // namespace llmfast::cpu::LLMFAST_ISA
