// Attention backward in one pass: the outer loop runs over blocks of 64 keys, the inner one over blocks of 64 queries
// (attention_backward_block.inl). A few key blocks go through the queries together, so that a block of queries is
// staged once for all of them.
//
// dQ is summed over chunks of key blocks whose number follows from Nk alone, and the chunks are added in order: its
// bits are the same whether one thread walks through the chunks of a head or several share them.
namespace llmfast::cpu::LLMFAST_ISA {
namespace attention_bwd {

constexpr int64_t kChunkKeys = 512, kMaxChunks = 16;  // adding a chunk's dQ costs about 1 % of what computes it
constexpr int64_t kSlotBytes = 256 << 20;  // for dQ of chunks on their way: 4 of 8 heads x 32768 x 64 in float32

// A row of a gradient times a factor; dk and dq are kept without scale, which is cheaper here than in dS.
template <class T>
LLMFAST_INLINE void narrow(const compute<T>* from, int64_t n, compute<T> factor, T* to) {
  constexpr int L = kLanesOf<compute<T>>;
  int64_t d = 0;
  for (; d + L <= n; d += L) storeu(to + d, loadu(from + d) * factor);
  if (d < n) store_part(to + d, loadu(from + d) * factor, n - d);
}

// dq of one sequence and the heads of one kv head: rows of heads, C wide.
template <class C>
struct Gradient {
  C* data;
  int64_t head, row;
};

// The queries that see some of keys [j0, j1), whole blocks of them.
struct Range {
  int64_t first, end;
};
LLMFAST_INLINE Range queries(const AttentionSpec& spec, const Sequence& s, int64_t j0, int64_t j1) {
  const int64_t offset = s.Nk - s.Nq, first = clamp(j0 - offset - spec.right, 0, s.Nq) / kBlock * kBlock,
                end = clamp(j1 - offset + spec.left, first, s.Nq);
  return {first, min(s.Nq, (end + kBlock - 1) / kBlock * kBlock)};
}

// Key blocks [j0, j1) of one sequence and kv head against all queries: dk and dv, and their part of dq.
template <class T>
void keys(const AttentionBackward& a, const Sequence& s, int64_t hk, int64_t group, int64_t j0, int64_t j1,
          bool adjusts, Workspace<T>& w, const Gradient<compute<T>>& dq) {
  using C = compute<T>;
  const int64_t D = a.q.size[3], Dv = a.v.size[3], offset = s.Nk - s.Nq;
  const C scale = static_cast<C>(a.spec.scale);
  auto at = [&](const Tensor& t, int64_t head, int64_t row) {
    return reinterpret_cast<T*>(t.data) + s.batch * t.stride[0] + head * t.stride[1] + row * t.stride[2];
  };
  for (int64_t next; j0 < j1; j0 = next) {
    next = min(j1, j0 + w.together * kBlock);
    const int count = static_cast<int>((next - j0 + kBlock - 1) / kBlock);
    for (int b = 0; b < count; b++) {
      KeyBlock<T>& k = w.keys[b];
      k.j0 = j0 + b * kBlock, k.nk = min<int64_t>(kBlock, next - k.j0);
      k.rows = stage<T>(at(a.k, hk, s.k0 + k.j0), a.k.stride[2], k.nk, D, k.copy, k.pairs);
      transpose_rows(k.rows, k.nk, (D + kPer<T> - 1) / kPer<T>, k.kt);
      transpose_rows(stage<T>(at(a.v, hk, s.k0 + k.j0), a.v.stride[2], k.nk, Dv, w.do_copy, nullptr), k.nk,
                     (Dv + kPer<T> - 1) / kPer<T>, k.vt);
      memset(k.dk, 0, k.nk * wide(D) * sizeof(C)), memset(k.dv, 0, k.nk * wide(Dv) * sizeof(C));
    }
    const Range rows = queries(a.spec, s, j0, next);
    for (int64_t g = 0; g < group; g++)
      for (int64_t i = rows.first; i < rows.end; i += kBlock) {
        const int64_t h = hk * group + g, nq = min<int64_t>(kBlock, s.Nq - i);
        auto of = [&](const Tensor& t) {
          return reinterpret_cast<const C*>(t.data) + s.batch * t.stride[0] + h * t.stride[1] +
                 (s.q0 + i) * t.stride[2];
        };
        const C *lse = of(a.lse), *delta = of(a.delta);
        for (int64_t r = 0; r < nq; r++) {
          w.lse[r] = lse[r * a.lse.stride[2]], w.delta[r] = delta[r * a.delta.stride[2]];
          if (w.lse[r] == -kInfOf<C>) w.lse[r] = kInfOf<C>;  // no key seen: P = 0
        }
        const auto qs = stage<T>(at(a.q, h, s.q0 + i), a.q.stride[2], nq, D, w.q_copy, w.q_rows),
                   dos = stage<T>(at(a.dout, h, s.q0 + i), a.dout.stride[2], nq, Dv, w.do_copy, w.do_rows);
        for (int b = 0; b < count; b++)
          block<T>({a, s, h, i, nq, w.keys[b].j0, w.keys[b].nk, offset}, w, qs, dos, w.keys[b], adjusts,
                   dq.data + g * dq.head + i * dq.row, dq.row);
      }
    for (int b = 0; b < count; b++)
      for (int64_t j = 0; j < w.keys[b].nk; j++) {
        const KeyBlock<T>& k = w.keys[b];
        narrow<T>(k.dk + j * wide(D), D, scale, at(a.dk, hk, s.k0 + k.j0 + j));
        narrow<T>(k.dv + j * wide(Dv), Dv, 1, at(a.dv, hk, s.k0 + k.j0 + j));
      }
  }
}

// The chunks of a sequence, and the first key of chunk c.
LLMFAST_INLINE int64_t chunks(int64_t Nk) { return clamp(Nk / kChunkKeys, 1, kMaxChunks); }
LLMFAST_INLINE int64_t chunk_start(int64_t Nk, int64_t c) {
  const int64_t blocks = (Nk + kBlock - 1) / kBlock, n = chunks(Nk);
  return c == n ? Nk : blocks * c / n * kBlock;
}

template <class T>
Workspace<T> workspace(Scratch& scratch, int64_t D, int64_t Dv) {
  using C = compute<T>;
  const int64_t W = wide(D), Wv = wide(Dv), tile = kBlock * kBlock, key_block = kBlock * (4 * W + 2 * Wv);
  Workspace<T> w;
  w.together = static_cast<int>(clamp(kTogetherBytes / max<int64_t>(1, key_block * sizeof(C)), 1, kTogether));
  C* at =
      static_cast<C*>(scratch.bytes((w.together * key_block + kBlock * 2 * (W + Wv) + 8 * tile) * int64_t(sizeof(C))));
  auto take = [&](auto*& p, int64_t n) { p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(at), at += n; };
  for (int b = 0; b < w.together; b++) {
    KeyBlock<T>& k = w.keys[b];
    take(k.kt, kBlock * W), take(k.vt, kBlock * Wv), take(k.dk, kBlock * W), take(k.dv, kBlock * Wv);
    take(k.pairs, kBlock * W), take(k.copy, kBlock * W);
  }
  take(w.p, tile), take(w.s, tile), take(w.q_rows, kBlock * W), take(w.do_rows, kBlock * Wv);
  take(w.p_pairs, tile / 2), take(w.s_pairs, tile / 2), take(w.s_rows, tile / 2);
  take(w.q_copy, kBlock * W), take(w.do_copy, kBlock * Wv);
  take(w.dropped, tile), take(w.cap, tile), take(w.kept, tile);
  return w;
}

// dsinks = -sum of exp(sink - lse) delta over batch and queries, in order
template <class C>
void sink_gradients(const AttentionBackward& a) {
#pragma omp parallel for
  for (int64_t h = 0; h < a.q.size[1]; h++) {
    const C sink = element<C>(a.extras.sinks, h * a.extras.sinks.stride[0]);
    double sum = 0;
    for (int64_t b = 0; b < a.q.size[0]; b++)
      for (int64_t i = 0; i < a.q.size[2]; i++) {
        const C lse =
            reinterpret_cast<const C*>(a.lse.data)[b * a.lse.stride[0] + h * a.lse.stride[1] + i * a.lse.stride[2]];
        const C delta = reinterpret_cast<const C*>(
            a.delta.data)[b * a.delta.stride[0] + h * a.delta.stride[1] + i * a.delta.stride[2]];
        if (lse != -kInfOf<C>) sum -= exp(sink - lse) * delta;
      }
    reinterpret_cast<C*>(a.dsinks.data)[h * a.dsinks.stride[0]] = static_cast<C>(sum);
  }
}

template <class T>
void zero(const Tensor& t) {
  for (int64_t b = 0; b < t.size[0]; b++)
    for (int64_t h = 0; h < t.size[1]; h++)
      for (int64_t i = 0; i < t.size[2]; i++)
        memset(t.data + (b * t.stride[0] + h * t.stride[1] + i * t.stride[2]) * sizeof(T), 0, t.size[3] * sizeof(T));
}

template <class T>
void run(const AttentionBackward& a) {
  using C = compute<T>;
  const int64_t Hk = a.k.size[1], group = Hk ? a.q.size[1] / Hk : 1, D = a.q.size[3], Dv = a.v.size[3], W = wide(D);
  const int64_t B = sequences(a.q, a.extras), Nq = a.q.size[2], H = a.q.size[1];
  const Extras& e = a.extras;
  const bool adjusts = e.bias || e.mask || e.alibi_slopes || a.spec.softcap != 0 || a.spec.dropout_p != 0;
  const bool in_place = std::is_same_v<T, C> && D % kLanesOf<C> == 0;
  if (e.cu_seqlens_q) zero<T>(a.dq), zero<T>(a.dk), zero<T>(a.dv);  // rows that no sequence covers
  if (a.dsinks) sink_gradients<C>(a);
  // What adds to the same element of dbias stays in one task, in order.
  const bool one_b = a.dbias && a.dbias.size[0] == 1, one_h = a.dbias && a.dbias.size[1] == 1;
  const int64_t unit_b = one_b ? min<int64_t>(B, 1) : B, unit_h = one_h ? min<int64_t>(Hk, 1) : Hk;
  int64_t most = 1;
  for (int64_t b = 0; b < B; b++) most = max(most, chunks(sequence(a.q, a.k, e, b).Nk));
  // Chunks of few sequences go to threads of their own, two for each thread at a time: slot 0 holds the sum so far. Two
  // slots are what a task that goes through all chunks takes as well; of three, two chunks are on their way.
  const int64_t part = max<int64_t>(a.q.size[0] * H * Nq * W, 16), threads = omp_get_max_threads(),
                units = unit_b * unit_h;
  const int64_t slots = max<int64_t>(3, min(min(most, 2 * threads), kSlotBytes / (part * int64_t(sizeof(C)))));
  const bool wanted = most > 1 && units < threads && !(a.dbias && a.dbias.size[3] == 1);
  C* const parts = wanted ? static_cast<C*>(aligned_alloc(64, slots * part * sizeof(C))) : nullptr;
  const bool split = parts != nullptr;
  const int64_t rounds = split ? most : 1;
  auto finish = [&](const Sequence& s, int64_t h, int64_t i, const C* row) {
    narrow<T>(
        row, D, static_cast<C>(a.spec.scale),
        reinterpret_cast<T*>(a.dq.data) + s.batch * a.dq.stride[0] + h * a.dq.stride[1] + (s.q0 + i) * a.dq.stride[2]);
  };
#pragma omp parallel if (units * rounds > 1)
  for (int64_t c0 = 0, c1; c0 < rounds; c0 = c1) {
    c1 = min(rounds, c0 + slots - (c0 > 0));
    static thread_local Scratch scratch, sums;
    Workspace<T> w = workspace<T>(scratch, D, Dv);
    auto slot = [&](int64_t c) { return parts + (c - c0 + (c0 > 0)) * part; };
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < units * (c1 - c0); t++) {
      const int64_t c = c0 + t / units, ub = t % units / unit_h, uh = t % unit_h;
      for (int64_t b = one_b ? 0 : ub; b < (one_b ? B : ub + 1); b++)
        for (int64_t hk = one_h ? 0 : uh; hk < (one_h ? Hk : uh + 1); hk++) {
          const Sequence s = sequence(a.q, a.k, e, b);
          const int64_t n = chunks(s.Nk), head = s.Nq * W;
          if (split) {
            if (c >= n) continue;
            C* data = slot(c) + ((s.batch * H + hk * group) * Nq + s.q0) * W;
            for (int64_t g = 0; g < group; g++) memset(data + g * Nq * W, 0, head * sizeof(C));
            keys(a, s, hk, group, chunk_start(s.Nk, c), chunk_start(s.Nk, c + 1), adjusts, w,
                 Gradient<C>{data, Nq * W, W});
            continue;
          }
          C* const own =
              static_cast<C*>(sums.bytes(max<int64_t>(64, ((in_place ? 0 : 1) + (n > 1)) * group * head * sizeof(C))));
          Gradient<C> total{own, head, W};
          const Gradient<C> next{own + (in_place ? 0 : group * head), head, W};
          if (in_place)
            total = {reinterpret_cast<C*>(a.dq.data) + s.batch * a.dq.stride[0] + hk * group * a.dq.stride[1] +
                         s.q0 * a.dq.stride[2],
                     a.dq.stride[1], a.dq.stride[2]};
          for (int64_t g = 0; g < group; g++)
            for (int64_t i = 0; i < s.Nq; i++) memset(total.data + g * total.head + i * total.row, 0, D * sizeof(C));
          for (int64_t p = 0; p < n; p++) {
            const int64_t j0 = chunk_start(s.Nk, p), j1 = chunk_start(s.Nk, p + 1);
            if (p == 0) {
              keys(a, s, hk, group, j0, j1, adjusts, w, total);
              continue;
            }
            const auto [first, end] = queries(a.spec, s, j0, j1);
            for (int64_t g = 0; g < group; g++)
              memset(next.data + g * head + first * W, 0, (end - first) * W * sizeof(C));
            keys(a, s, hk, group, j0, j1, adjusts, w, next);
            for (int64_t g = 0; g < group; g++)
              for (int64_t i = first; i < end; i++) {
                C *to = total.data + g * total.head + i * total.row, *from = next.data + g * head + i * W;
                for (int64_t d = 0; d < D; d++) to[d] += from[d];
              }
          }
          for (int64_t g = 0; g < group; g++)
            for (int64_t i = 0; i < s.Nq; i++)
              finish(s, hk * group + g, i, total.data + g * total.head + i * total.row);
        }
    }
    if (split) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < B * H; t++) {
        const Sequence s = sequence(a.q, a.k, e, t / H);
        for (int64_t i = 0; i < s.Nq; i++) {
          C* row = parts + ((s.batch * H + t % H) * Nq + s.q0 + i) * W;
          for (int64_t c = max<int64_t>(c0, 1); c < min(c1, chunks(s.Nk)); c++) {
            const C* const more = row + (slot(c) - parts);
            for (int64_t d = 0; d < D; d++) row[d] += more[d];
          }
          if (c1 == rounds) finish(s, t % H, i, row);
        }
      }
    }
  }
  free(parts);
}

// delta = rowsum(o * do) with lanes over rows, summed in the order of dP: a row that sees one key gets dS = 0 exactly.
template <class T>
void rowdot(const Tensor& o, const Tensor& dout, const Tensor& delta) {
  using C = compute<T>;
  using U = unit<T>;
  constexpr int L = kLanesOf<C>, kStep = L * static_cast<int>(sizeof(U) / (kPairs<T> ? sizeof(T) : sizeof(C)));
  const int64_t H = o.size[1], Nq = o.size[2], D = o.size[3], groups = (Nq + L - 1) / L, tasks = o.size[0] * H * groups;
#pragma omp parallel for if (tasks * L * D > 100000)
  for (int64_t t = 0; t < tasks; t++) {
    const int64_t b = t / (H * groups), h = t / groups % H, i0 = t % groups * L, n = min<int64_t>(L, Nq - i0);
    auto lanes = [&](const Tensor& x, int64_t d, auto& r) {  // r[i]: unit d / units + i of each row
      const T* p = reinterpret_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1] + i0 * x.stride[2] + d;
      LLMFAST_UNROLL
      for (int i = 0; i < L; i++, p += x.stride[2]) {
        r[i] = std::remove_reference_t<decltype(r[0])>{};
        if (i >= n) continue;
        if constexpr (kPairs<T>) {
          U part[L] = {};
          memcpy(part, p, min<int64_t>(D - d, kStep) * sizeof(T));
          r[i] = loadu(part);
        } else {
          r[i] = D - d < kStep ? load_part(p, D - d) : loadu(p);
        }
      }
      transpose(r);
    };
    vec_of<C> acc{};
    for (int64_t d = 0; d < D; d += kStep) {
      decltype(load(static_cast<U*>(nullptr))) x[L], y[L];
      lanes(o, d, x), lanes(dout, d, y);
      LLMFAST_UNROLL
      for (int i = 0; i < L; i++) {
        if constexpr (kPairs<T>) {
          acc = dot(acc, x[i], y[i]);
        } else {
          acc += x[i] * y[i];
        }
      }
    }
    C* to = reinterpret_cast<C*>(delta.data) + b * delta.stride[0] + h * delta.stride[1] + i0 * delta.stride[2];
    for (int64_t i = 0; i < n; i++) to[i * delta.stride[2]] = acc[i];
  }
}

}  // namespace attention_bwd

void attention_backward(const AttentionBackward& a) {
  switch (a.q.dtype) {
    case Dtype::kFloat32:
      return attention_bwd::run<float>(a);
    case Dtype::kBFloat16:
      return attention_bwd::run<bf16>(a);
    case Dtype::kFloat16:
      return attention_bwd::run<f16>(a);
    default:
      return attention_bwd::run<double>(a);
  }
}

void rowdot(const Tensor& o, const Tensor& dout, const Tensor& delta) {
  switch (o.dtype) {
    case Dtype::kFloat32:
      return attention_bwd::rowdot<float>(o, dout, delta);
    case Dtype::kBFloat16:
      return attention_bwd::rowdot<bf16>(o, dout, delta);
    case Dtype::kFloat16:
      return attention_bwd::rowdot<f16>(o, dout, delta);
    default:
      return attention_bwd::rowdot<double>(o, dout, delta);
  }
}

}  // namespace llmfast::cpu::LLMFAST_ISA
