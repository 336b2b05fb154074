// The gradient of softmax and log_softmax of (L0, L1, M, N):
//   ds = y (dy - sum(y dy)), or dy - exp(y) sum(dy) for log_softmax; dx = scale ds; dbias adds up ds.
// Where M is the contiguous dimension, a lane is a row.
namespace llmfast::cpu::LLMFAST_ISA {
namespace softmax_rows {

// How many rows of n numbers are taken at once: y and dy of them stay in half of an L1.
template <class T>
int64_t rows_of(int64_t n) {
  return clamp((16 << 10) / static_cast<int64_t>(2 * sizeof(T)) / n, 1, kLanesOf<compute<T>>);
}

// The gradient of a few rows, at most kLanes, so many elements apart, without bias or logarithm: all their sums are on
// their way at once, where each row alone waits for its own.
template <class T>
void plain_backward_rows(const T* y, int64_t y_step, const T* dy, int64_t dy_step, T* dx, int64_t dx_step, int64_t rows,
                         int64_t n, compute<T> scale) {
  using C = compute<T>;
  using V = vec_of<C>;
  constexpr int L = kLanesOf<C>;
  const int64_t whole = n / L * L;
  V s[L] = {};
  for (int64_t r = 0; r < rows; r++) {
    const T *p = y + r * y_step, *q = dy + r * dy_step;
    V sum[4] = {};
    int64_t j = 0;
    auto add_two = [&](V& first, V& second) __attribute__((always_inline)) {
      V v, d, w, e;
      load_two<true>(p + j, v, w), load_two<true>(q + j, d, e);
      first += v * d, second += w * e, j += 2 * L;
    };
    while (j + 4 * L <= n) add_two(sum[0], sum[1]), add_two(sum[2], sum[3]);
    if (j + 2 * L <= n) add_two(sum[0], sum[1]);
    if (j < whole) sum[2] += loadu(p + j) * loadu(q + j);
    if (whole < n) sum[3] += load_part(p + whole, n - whole) * load_part(q + whole, n - whole);
    s[r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
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
void backward_row(const SoftmaxBackward& p, int64_t a, int64_t b, int64_t i) {
  using C = compute<T>;
  using V = vec_of<C>;
  constexpr int L = kLanesOf<C>;
  const int64_t N = p.y.size[3];
  const T *y = at<T>(p.y, a, b, i), *dy = at<T>(p.dy, a, b, i);
  T* dx = at<T>(p.dx, a, b, i);
  const C scale = static_cast<C>(p.scale);
  if (!p.log && !p.dbias && rows_of<T>(N) > 1) return plain_backward_rows(y, 0, dy, 0, dx, 0, 1, N, scale);
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
  const C all = static_cast<C>(total(sums));
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

// tile (n, Z kLanes): columns [0, n) of count rows of dy, at most Z kLanes of them, which lie one after the other.
template <int Z, class T>
void stage(const T* dy, int64_t step, int64_t count, int64_t n, T* tile) {
  constexpr int L = kLanesOf<compute<T>>;
  for (int z = 0; z < Z; z++)
    for (int64_t j = 0; j < n; j += L) {
      vec_of<compute<T>> r[L];
      for (int k = 0; k < L; k++) {
        const T* const from = dy + (z * L + k) * step + j;
        r[k] = z * L + k >= count ? vec_of<compute<T>>{} : n - j < L ? load_part(from, n - j) : loadu(from);
      }
      transpose(r);
      for (int k = 0; k < min<int64_t>(L, n - j); k++) storeu(tile + ((j + k) * Z + z) * L, r[k]);
    }
}

// backward_row of Z kLanes rows from i of tensors whose contiguous dimension is M: lanes are rows. Of a dy whose rows
// lie one after the other kBlock columns are turned at a time.
template <int Z, class T>
void backward_columns(const SoftmaxBackward& p, int64_t a, int64_t b, int64_t i) {
  using C = compute<T>;
  using V = vec_of<C>;
  constexpr int L = kLanesOf<C>;
  const int64_t N = p.y.size[3], count = p.y.size[2] - i;
  const T *y = at<T>(p.y, a, b, i), *dy = at<T>(p.dy, a, b, i);
  T* dx = at<T>(p.dx, a, b, i);
  const C scale = static_cast<C>(p.scale);
  auto counts = [&](V v, V d) { return v == -kInfOf<C> ? V{} : d; };
  V v[Z], d[Z], all[Z];
  const bool turned = p.dy.stride[3] == 1;
  const int64_t step = turned ? Z * L : p.dy.stride[3];
  alignas(64) T tile[kBlock * Z * L];
  const T* block = nullptr;  // dy of the columns from first
  int64_t first = -1;
  auto go_to = [&](int64_t j) {
    if (first == j) return;
    block = turned ? tile : dy + j * step, first = j;
    if (turned) stage<Z>(dy + j, p.dy.stride[2], count, min(kBlock, N - j), tile);
  };
  auto read = [&](int64_t j) __attribute__((always_inline)) {
    read_lanes<Z>(y + j * p.y.stride[3], count, v), read_lanes<Z>(block + (j - first) * step, count, d);
  };
  double totals[Z * L] = {};
  for (int64_t j = 0; j < N; j += kBlock) {
    go_to(j);
    V sums[Z] = {};
    for (int64_t r = j; r < min(j + kBlock, N); r++) {
      read(r);
      LLMFAST_UNROLL
      for (int k = 0; k < Z; k++) sums[k] += p.log ? counts(v[k], d[k]) : v[k] * d[k];
    }
    for (int k = 0; k < Z * L; k++) totals[k] += sums[k / L][k % L];
  }
  for (int k = 0; k < Z * L; k++) all[k / L][k % L] = static_cast<C>(totals[k]);
  for (int64_t j = 0; j < N; j++) {
    if (j % kBlock == 0) go_to(j);
    read(j);
    LLMFAST_UNROLL
    for (int k = 0; k < Z; k++)
      v[k] = (p.log ? counts(v[k], d[k]) - exponential<C>(v[k]) * all[k] : v[k] * (d[k] - all[k])) * scale;
    write_lanes<Z>(dx + j * p.dx.stride[3], count, v);
  }
}

template <class T>
void backward(const SoftmaxBackward& p) {
  if (p.y.size[3] > 1 && p.y.stride[3] != 1) {
    const int64_t M = p.y.size[2], L1 = p.y.size[1];
    const Lanes<compute<T>> side(M);
    const int64_t groups = side.groups, all = p.y.size[0] * L1 * groups;
#pragma omp parallel for schedule(static) if (all > 1 && p.y.size[0] * L1 * M * p.y.size[3] > 32768)
    for (int64_t t = 0; t < all; t++) {
      const int64_t a = t / (L1 * groups), b = t / groups % L1, g = t % groups;
      (g < side.fours ? backward_columns<4, T> : backward_columns<1, T>)(p, a, b, side.first(g));
    }
    return;
  }
  const int64_t N = p.y.size[3], rows = p.y.size[0] * p.y.size[1] * p.y.size[2];
  if (rows * N == 0) return;
  if (const int64_t y = step_of(p.y), dy = step_of(p.dy), dx = step_of(p.dx), some = rows_of<T>(N);
      !p.dbias && !p.log && some > 1 && y && dy && dx) {
#pragma omp parallel for schedule(static) if (rows * N > 32768)
    for (int64_t r = 0; r < rows; r += some)
      plain_backward_rows(at<T>(p.y, 0, 0, 0) + r * y, y, at<T>(p.dy, 0, 0, 0) + r * dy, dy,
                          at<T>(p.dx, 0, 0, 0) + r * dx, dx, min(some, rows - r), N, static_cast<compute<T>>(p.scale));
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
