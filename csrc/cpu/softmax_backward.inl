// The gradient of softmax and log_softmax of (L0, L1, M, N):
//   ds = y (dy - sum(y dy)), or dy - exp(y) sum(dy) for log_softmax; dx = scale ds; dbias adds up ds.
// Where M is the contiguous dimension, a lane is a row.
namespace llmfast::cpu::LLMFAST_ISA {
namespace softmax_rows {

// Numbers in a row of which kLanes rows of y and dy stay in 16 KiB, half of an L1.
template <class T>
constexpr int64_t kShort = (sizeof(T) == 2 ? 16 : 8) * kLanesOf<compute<T>>;

// The gradient of a few rows, at most kLanes, so many elements apart, of at most kShort numbers, without bias or
// logarithm: their lanes are added up together, where each row alone waits for its own.
template <class T>
LLMFAST_INLINE void short_backward_rows(const T* y, int64_t y_step, const T* dy, int64_t dy_step, T* dx,
                                        int64_t dx_step, int64_t rows, int64_t n, compute<T> scale) {
  using C = compute<T>;
  using V = vec_of<C>;
  constexpr int L = kLanesOf<C>;
  const int64_t whole = n / L * L;
  V s[L] = {};
  for (int64_t r = 0; r < rows; r++) {
    const T *p = y + r * y_step, *q = dy + r * dy_step;
    V sum{}, odd{};
    int64_t j = 0;
    for (; j + 2 * L <= n; j += 2 * L) {
      V v, d, w, e;
      load_two<true>(p + j, v, w), load_two<true>(q + j, d, e);
      sum += v * d, odd += w * e;
    }
    if (j < whole) sum += loadu(p + j) * loadu(q + j);
    if (whole < n) odd += load_part(p + whole, n - whole) * load_part(q + whole, n - whole);
    s[r] = sum + odd;
  }
  alignas(64) C all[L];
  store(all, sums<L>(s));
  for (int64_t r = 0; r < rows; r++) {
    const T *p = y + r * y_step, *q = dy + r * dy_step;
    T* const to = dx + r * dx_step;
    int64_t j = 0;
    for (; j + 2 * L <= n; j += 2 * L) {
      V v, d, w, e;
      load_two<true>(p + j, v, w), load_two<true>(q + j, d, e);
      store_two<true>(to + j, v * (d - all[r]) * scale, w * (e - all[r]) * scale);
    }
    if (j < whole) storeu(to + j, loadu(p + j) * (loadu(q + j) - all[r]) * scale);
    if (whole < n)
      store_part(to + whole, load_part(p + whole, n - whole) * (load_part(q + whole, n - whole) - all[r]) * scale,
                 n - whole);
  }
}

template <class T>
LLMFAST_INLINE void backward_row(const SoftmaxBackward& p, int64_t a, int64_t b, int64_t i) {
  using C = compute<T>;
  using V = vec_of<C>;
  constexpr int L = kLanesOf<C>;
  const int64_t N = p.y.size[3];
  const T *y = at<T>(p.y, a, b, i), *dy = at<T>(p.dy, a, b, i);
  T* dx = at<T>(p.dx, a, b, i);
  const C scale = static_cast<C>(p.scale);
  if (!p.log && !p.dbias && N <= kShort<T>) return short_backward_rows(y, 0, dy, 0, dx, 0, 1, N, scale);
  auto counts = [&](V v, V d) { return v == -kInfOf<C> ? V{} : d; };
  auto term = [&](V v, V d) __attribute__((always_inline)) { return p.log ? counts(v, d) : v * d; };
  auto last = [&](const T* x, int64_t n) __attribute__((always_inline)) { return n < L ? load_part(x, n) : loadu(x); };
  V sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * L <= N; j += 4 * L) LLMFAST_UNROLL
  for (int k = 0; k < 4; k += 2) {
    V v, d, w, e;
    load_two<true>(y + j + k * L, v, w), load_two<true>(dy + j + k * L, d, e);
    sums[k] += term(v, d), sums[k + 1] += term(w, e);
  }
  for (; j < N; j += L) sums[0] += term(last(y + j, N - j), last(dy + j, N - j));
  // a few vectors' sums need no doubles to be added
  const C all = static_cast<C>(N <= 16 * L ? total((sums[0] + sums[1]) + (sums[2] + sums[3])) : total(sums));
  auto gradient = [&](V v, V d) __attribute__((always_inline)) {
    return p.log ? counts(v, d) - exponential<C>(v) * all : v * (d - all);
  };
  C* const db = p.dbias ? at<C>(p.dbias, a, b, i) : nullptr;
  C over_row = 0;
  j = 0;
  for (; !db && j + 2 * L <= N; j += 2 * L) {
    V v, d, w, e;
    load_two<true>(y + j, v, w), load_two<true>(dy + j, d, e);
    store_two<true>(dx + j, gradient(v, d) * scale, gradient(w, e) * scale);
  }
  for (; j < N; j += L) {
    const int64_t n = min<int64_t>(L, N - j);
    const V ds = gradient(last(y + j, n), last(dy + j, n));
    if (n == L) {
      storeu(dx + j, ds * scale);
    } else {
      store_part(dx + j, ds * scale, n);
    }
    for (int64_t k = 0; db && k < n; k++) (p.dbias.stride[3] ? db[(j + k) * p.dbias.stride[3]] : over_row) += ds[k];
  }
  if (db && !p.dbias.stride[3]) *db += over_row;
}

// backward_row of kLanes rows from i of tensors whose contiguous dimension is M: lanes are rows.
template <class T>
void backward_columns(const SoftmaxBackward& p, int64_t a, int64_t b, int64_t i) {
  using C = compute<T>;
  using V = vec_of<C>;
  constexpr int L = kLanesOf<C>;
  constexpr int64_t kBlock = 256;  // what is summed in the compute type; the blocks' sums are added in double
  const int64_t N = p.y.size[3], count = min<int64_t>(L, p.y.size[2] - i);
  const T *y = at<T>(p.y, a, b, i), *dy = at<T>(p.dy, a, b, i);
  T* dx = at<T>(p.dx, a, b, i);
  const C scale = static_cast<C>(p.scale);
  auto read = [&](const T* x) __attribute__((always_inline)) { return count < L ? load_part(x, count) : loadu(x); };
  auto counts = [&](V v, V d) { return v == -kInfOf<C> ? V{} : d; };
  double totals[L] = {};
  for (int64_t j = 0; j < N; j += kBlock) {
    V sums{};
    for (int64_t k = j; k < min(j + kBlock, N); k++) {
      const V v = read(y + k * p.y.stride[3]), d = read(dy + k * p.dy.stride[3]);
      sums += p.log ? counts(v, d) : v * d;
    }
    for (int k = 0; k < L; k++) totals[k] += sums[k];
  }
  V all;
  for (int k = 0; k < L; k++) all[k] = static_cast<C>(totals[k]);
  for (int64_t j = 0; j < N; j++) {
    const V v = read(y + j * p.y.stride[3]), d = read(dy + j * p.dy.stride[3]);
    const V ds = (p.log ? counts(v, d) - exponential<C>(v) * all : v * (d - all)) * scale;
    if (count < L) {
      store_part(dx + j * p.dx.stride[3], ds, count);
    } else {
      storeu(dx + j * p.dx.stride[3], ds);
    }
  }
}

template <class T>
void backward(const SoftmaxBackward& p) {
  if (p.y.size[3] > 1 && p.y.stride[3] != 1) {
    const int64_t L = kLanesOf<compute<T>>, L1 = p.y.size[1], groups = (p.y.size[2] + L - 1) / L;
    const int64_t all = p.y.size[0] * L1 * groups;
#pragma omp parallel for schedule(static) if (all > 1 && all * L * p.y.size[3] > 32768)
    for (int64_t t = 0; t < all; t++) backward_columns<T>(p, t / (L1 * groups), t / groups % L1, t % groups * L);
    return;
  }
  const int64_t N = p.y.size[3], rows = p.y.size[0] * p.y.size[1] * p.y.size[2];
  if (const int64_t y = step_of(p.y), dy = step_of(p.dy), dx = step_of(p.dx);
      !p.dbias && !p.log && N <= kShort<T> && y && dy && dx) {
    constexpr int64_t L = kLanesOf<compute<T>>;
#pragma omp parallel for schedule(static) if (rows * N > 32768)
    for (int64_t r = 0; r < rows; r += L)
      short_backward_rows(at<T>(p.y, 0, 0, 0) + r * y, y, at<T>(p.dy, 0, 0, 0) + r * dy, dy,
                          at<T>(p.dx, 0, 0, 0) + r * dx, dx, min(L, rows - r), N, static_cast<compute<T>>(p.scale));
    return;
  }
  // Rows that add to the same element of dbias stay in one task, in order.
  const int64_t* size = p.y.size;
  int64_t units[3], tasks = 1;
  for (int k = 0; k < 3; k++) tasks *= units[k] = p.dbias && p.dbias.size[k] == 1 ? min<int64_t>(size[k], 1) : size[k];
  auto first = [&](int k, int64_t unit) { return units[k] == size[k] ? unit : 0; };
  auto end = [&](int k, int64_t unit) { return units[k] == size[k] ? unit + 1 : size[k]; };
#pragma omp parallel if (tasks > 1 && size[0] * size[1] * size[2] * size[3] > 32768)
  {
    Indices task{units[1], units[2]};
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tasks; t++) {
      task.go_to(t);
      const int64_t* const u = task.at;
      for (int64_t a = first(0, u[0]); a < end(0, u[0]); a++)
        for (int64_t b = first(1, u[1]); b < end(1, u[1]); b++)
          for (int64_t i = first(2, u[2]); i < end(2, u[2]); i++) backward_row<T>(p, a, b, i);
    }
  }
}

}  // namespace softmax_rows

void softmax_backward(const SoftmaxBackward& p) {
  switch (p.y.dtype) {
    case Dtype::kFloat32:
      return softmax_rows::backward<float>(p);
    case Dtype::kBFloat16:
      return softmax_rows::backward<bf16>(p);
    case Dtype::kFloat16:
      return softmax_rows::backward<f16>(p);
    default:
      return softmax_rows::backward<double>(p);
  }
}

}  // namespace llmfast::cpu::LLMFAST_ISA
