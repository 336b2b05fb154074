// loss and lse of logits x (T, V) and targets (T,), and the gradient of x:
//   loss = (1 - s) w[y] (lse - x[y]) + s / V sum w (lse - x) + z lse^2,   s label smoothing, x after the softcap
//   dx = dloss (a p - s / V w - (1 - s) w[y] onehot),   a = (1 - s) w[y] + s / V sum w + 2 z lse
// The forward reads the logits once, the backward reads and writes once: dx may be x itself.
namespace llmfast::cpu::LLMFAST_ISA {
namespace cross_entropy_rows {

constexpr int64_t kChunk = 2048;        // read twice where it rises, so it must stay in L1
constexpr int64_t kPart = 16 * kChunk;  // a task's columns: where a row is cut depends on V alone

struct Partial {
  double m, l, wx;  // max x, sum exp(x - m), sum w x
};

template <class V, class C>
LLMFAST_INLINE V capped(V x, C cap) {
  return tanh(x * (1 / cap)) * cap;
}

// f(e, k, n, x[e .. e + n)) for whole vectors, n = L, the k-th of 4, and for what is left, padded with `rest`. kMixed:
// the lanes of two neighbours may be exchanged, so that bf16 is widened by one shift or one mask.
template <bool kMixed = false, class T, class F>
LLMFAST_INLINE void each(const T* x, int64_t n, compute<T> cap, vec_of<compute<T>> rest, F&& f) {
  using C = compute<T>;
  constexpr int L = kLanesOf<C>;
  int64_t e = 0;
  if (cap == 0) {
    for (; e + 4 * L <= n; e += 4 * L) LLMFAST_UNROLL
    for (int k = 0; k < 4; k += 2) {
      vec_of<C> y, z;
      load_two<kMixed>(x + e + k * L, y, z);
      f(e + k * L, k, L, y), f(e + (k + 1) * L, k + 1, L, z);
    }
    for (; e + L <= n; e += L) f(e, 0, L, loadu(x + e));
  } else {
    for (; e + L <= n; e += L) f(e, 0, L, capped(loadu(x + e), cap));
  }
  if (e < n) {
    vec_of<C> y = load_part(x + e, n - e);
    if (cap != 0) y = capped(y, cap);
    f(e, 0, n - e, iota<C>() < static_cast<C>(n - e) ? y : rest);
  }
}

// One pass: a chunk is summed against the largest number before it, and again only where it rises far above that.
template <class T, bool kSmooth>
Partial part(const T* x, const compute<T>* w, int64_t n, compute<T> cap) {
  using C = compute<T>;
  using V = vec_of<C>;
  constexpr int L = kLanesOf<C>;
  constexpr C kRise = 64;  // a chunk of exp(64) is far from overflow
  const V none = splat(-kInfOf<C>);
  C m = -kInfOf<C>;
  double l = 0, wx = 0;
  for (int64_t j = 0; j < n; j += kChunk) {
    const int64_t c = min(kChunk, n - j);
    double sum, product;
    auto add = [&](C base) __attribute__((always_inline)) {  // gives the largest
      V most[4] = {none, none, none, none}, sums[4] = {}, products[4] = {};
      each<!kSmooth>(x + j, c, cap, none, [&](int64_t e, int k, int64_t count, V y) __attribute__((always_inline)) {
        most[k] = max(most[k], y);
        sums[k] += softmax_rows::exponential<C>(y - base);
        if constexpr (kSmooth) {
          const V weights = !w ? splat(C(1)) : count == L ? loadu(w + j + e) : load_part(w + j + e, count);
          products[k] += count == L ? y * weights : iota<C>() < static_cast<C>(count) ? y * weights : V{};
        }
      });
      sum = softmax_rows::total((sums[0] + sums[1]) + (sums[2] + sums[3]));
      if constexpr (kSmooth) product = softmax_rows::total((products[0] + products[1]) + (products[2] + products[3]));
      return greatest(max(max(most[0], most[1]), max(most[2], most[3])));
    };
    if (m == -kInfOf<C>) {  // nothing to sum against yet
      V most[4] = {none, none, none, none};
      each<true>(x + j, c, cap, none,
                 [&](int64_t, int k, int64_t, V y) __attribute__((always_inline)) { most[k] = max(most[k], y); });
      m = greatest(max(max(most[0], most[1]), max(most[2], most[3])));
    }
    C base = softmax_rows::finite(m), top = add(base);
    if (top > base + kRise) l *= exp(static_cast<double>(m) - top), m = base = top, add(base);
    l += sum;
    if (top > m) l *= exp(static_cast<double>(m) - top), m = top;
    if constexpr (kSmooth) wx += product;
  }
  return {m, l, wx};
}

template <class C>
double sum_of_weights(const Tensor& weight, int64_t V) {
  if (!weight) return static_cast<double>(V);
  double sum = 0;
  for (int64_t j = 0; j < V; j++) sum += reinterpret_cast<const C*>(weight.data)[j];
  return sum;
}

LLMFAST_INLINE int64_t target_of(const Tensor& target, int64_t row) {
  return reinterpret_cast<const int64_t*>(target.data)[row * target.stride[0]];
}

template <class T>
void forward(const CrossEntropy& p) {
  using C = compute<T>;
  const int64_t rows = p.x.size[0], V = p.x.size[1], parts = max<int64_t>(1, (V + kPart - 1) / kPart);
  const C cap = static_cast<C>(p.softcap);
  const C* const w = reinterpret_cast<const C*>(p.weight.data);
  const double smooth = V ? p.label_smoothing / V : 0,
               all = p.label_smoothing != 0 ? sum_of_weights<C>(p.weight, V) : 0;
  static thread_local Scratch shared;
  Partial* const partial = static_cast<Partial*>(shared.bytes(rows * parts * sizeof(Partial) + 64));
#pragma omp parallel if (rows * parts > 1 && rows * V > 32768)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows * parts; t++) {
      const int64_t row = t / parts, j = t % parts * kPart, n = min(kPart, V - j);
      if (target_of(p.target, row) == p.ignore_index) continue;
      const T* x = reinterpret_cast<const T*>(p.x.data) + row * p.x.stride[0] + j;
      partial[t] =
          p.label_smoothing != 0 ? part<T, true>(x, w ? w + j : nullptr, n, cap) : part<T, false>(x, nullptr, n, cap);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      C& loss = reinterpret_cast<C*>(p.loss.data)[row];
      C& lse_out = reinterpret_cast<C*>(p.lse.data)[row];
      const int64_t y = target_of(p.target, row);
      if (y == p.ignore_index) {
        loss = lse_out = 0;
        continue;
      }
      double m = -kInfOf<double>, l = 0, wx = 0;
      for (int64_t k = 0; k < parts; k++) m = max(m, partial[row * parts + k].m);
      const double base = softmax_rows::finite(m);
      for (int64_t k = 0; k < parts; k++) {
        const Partial& q = partial[row * parts + k];
        l += q.l * exp(q.m - base), wx += q.wx;
      }
      const double lse = l == 0 ? -kInfOf<double> : base + log(l);
      if (y < 0 || y >= V) {
        loss = static_cast<C>(__builtin_nan("")), lse_out = static_cast<C>(lse);
        continue;
      }
      const T* x = reinterpret_cast<const T*>(p.x.data) + row * p.x.stride[0];
      C hit = to_float(x[y]);
      if (cap != 0) hit = capped(splat(hit), cap)[0];
      double sum = (1 - p.label_smoothing) * (w ? w[y] : C(1)) * (lse - hit);
      if (smooth != 0) sum += smooth * (all * lse - wx);
      if (p.z_loss != 0) sum += p.z_loss * lse * lse;
      loss = static_cast<C>(sum), lse_out = static_cast<C>(lse);
    }
  }
}

template <class T>
void backward(const CrossEntropyBackward& p) {
  using C = compute<T>;
  using V = vec_of<C>;
  constexpr int L = kLanesOf<C>;
  const int64_t rows = p.x.size[0], N = p.x.size[1], parts = (N + kPart - 1) / kPart;
  const C cap = static_cast<C>(p.softcap);
  const C* const w = reinterpret_cast<const C*>(p.weight.data);
  const double smooth = N ? p.label_smoothing / N : 0, all = smooth != 0 ? sum_of_weights<C>(p.weight, N) : 0;
#pragma omp parallel for schedule(static) if (rows * parts > 1 && rows * N > 32768)
  for (int64_t t = 0; t < rows * parts; t++) {
    const int64_t row = t / parts, j0 = t % parts * kPart, n = min(kPart, N - j0), y = target_of(p.target, row);
    const T* x = reinterpret_cast<const T*>(p.x.data) + row * p.x.stride[0] + j0;
    T* dx = reinterpret_cast<T*>(p.dx.data) + row * p.dx.stride[0] + j0;
    if (y == p.ignore_index) {
      memset(dx, 0, n * sizeof(T));
      continue;
    }
    const C lse = reinterpret_cast<const C*>(p.lse.data)[row * p.lse.stride[0]];
    const C dloss = reinterpret_cast<const C*>(p.dloss.data)[row * p.dloss.stride[0]];
    const bool valid = y >= 0 && y < N;
    const double hit = valid ? (1 - p.label_smoothing) * (w ? w[y] : C(1)) : __builtin_nan("");
    const C a = static_cast<C>((hit + smooth * all + 2 * p.z_loss * lse) * dloss);
    const C b = static_cast<C>(smooth * dloss), h = static_cast<C>(hit * dloss);
    auto gradient = [&](V v, V weights, C onehot) __attribute__((always_inline)) {
      V factor = splat(C(1));
      if (cap != 0) {
        const V th = tanh(v * (1 / cap));
        v = th * cap, factor = 1 - th * th;
      }
      V g = softmax_rows::exponential<C>(v - lse) * a;
      if (b != 0) g -= weights * b;
      return (g - onehot) * factor;
    };
    const bool here = valid && y >= j0 && y < j0 + n;
    C at_target = 0;
    if (here) at_target = gradient(splat(C(to_float(x[y - j0]))), splat(w ? w[y] : C(1)), h)[0];
    auto write = [&](auto&& f) __attribute__((always_inline)) {
      each(x, n, C(0), V{}, [&](int64_t e, int, int64_t count, V v) __attribute__((always_inline)) {
        if (count == L) {
          storeu(dx + e, f(e, count, v));
        } else {
          store_part(dx + e, f(e, count, v), count);
        }
      });
    };
    if (cap == 0 && b == 0) {
      write([&](int64_t, int64_t, V v)
                __attribute__((always_inline)) { return softmax_rows::exponential<C>(v - lse) * a; });
    } else {
      write([&](int64_t e, int64_t count, V v) __attribute__((always_inline)) {
        V weights = splat(C(1));
        if (w && b != 0) weights = count == L ? loadu(w + j0 + e) : load_part(w + j0 + e, count);
        return gradient(v, weights, C(0));
      });
    }
    if (here) from_float(dx + (y - j0), at_target);
  }
}

}  // namespace cross_entropy_rows

void cross_entropy_forward(const CrossEntropy& p) {
  switch (p.x.dtype) {
    case Dtype::kFloat32:
      return cross_entropy_rows::forward<float>(p);
    case Dtype::kBFloat16:
      return cross_entropy_rows::forward<bf16>(p);
    case Dtype::kFloat16:
      return cross_entropy_rows::forward<f16>(p);
    default:
      return cross_entropy_rows::forward<double>(p);
  }
}

void cross_entropy_backward(const CrossEntropyBackward& p) {
  switch (p.x.dtype) {
    case Dtype::kFloat32:
      return cross_entropy_rows::backward<float>(p);
    case Dtype::kBFloat16:
      return cross_entropy_rows::backward<bf16>(p);
    case Dtype::kFloat16:
      return cross_entropy_rows::backward<f16>(p);
    default:
      return cross_entropy_rows::backward<double>(p);
  }
}

}  // namespace llmfast::cpu::LLMFAST_ISA
