// y = x w^T + b for 1 to 16 rows, SIMD lanes over D: w (V, D) is streamed once, as it lies, for all rows.
//
// One task is kColumns = 16 columns. A dot product is a chain by lane over kBlock = 1024 elements, summed across lanes
// by one tree and then block by block: the bits of y[i][j] depend on x[i], w[j] and b[j] alone, not on the other rows
// or the threads. L = kLanes products (R rows x C columns x G groups of columns) are summed across lanes together. At
// most 4 columns, 4 KiB of each at a time, are read side by side, so that the hardware follows them.
namespace llmfast::cpu::LLMFAST_ISA {
namespace linear_fwd {

constexpr int64_t kColumns = 16, kBlock = 1024;
constexpr int64_t kMostRows = 16;

template <class T>
struct Columns {
  const T *x[kMostRows], *w[kColumns];
  int64_t D;
  alignas(64) float y[kMostRows * kColumns];  // (rows, 16)
};

// y[i + r][j] += x[i + r] . w[j] over the elements [d0, d1), for R rows and all columns
template <int R, class T>
LLMFAST_INLINE void products(Columns<T>& t, int64_t i, int64_t d0, int64_t d1) {
  constexpr int L = kLanes, C = L / R < 4 ? L / R : 4, G = L / (R * C), kStep = L * (kPairs<T> ? 2 : 1);
  for (int64_t j = 0; j < kColumns; j += G * C) {
    vec acc[L];
    LLMFAST_UNROLL
    for (int g = 0; g < G; g++) {
      vec a[R * C] = {};
      auto step = [&](int64_t d, auto part) __attribute__((always_inline)) {
        decltype(units<T, false>(t.x[0], 0)) w[C];
        LLMFAST_UNROLL
        for (int c = 0; c < C; c++) w[c] = units<T, decltype(part)::value>(t.w[j + g * C + c] + d, t.D - d);
        LLMFAST_UNROLL
        for (int r = 0; r < R; r++) {
          auto x = units<T, decltype(part)::value>(t.x[i + r] + d, t.D - d);
          LLMFAST_UNROLL
          for (int c = 0; c < C; c++) a[c * R + r] = product(a[c * R + r], x, w[c]);
        }
      };
      int64_t d = d0;
      for (; d + kStep <= d1; d += kStep) step(d, std::false_type{});
      if (d < d1) step(d, std::true_type{});
      LLMFAST_UNROLL
      for (int n = 0; n < R * C; n++) acc[g * R * C + n] = a[n];
    }
    alignas(64) float dots[L];
    store(dots, sums(acc));
    for (int n = 0; n < L; n++) t.y[(i + n % R) * kColumns + j + n / R] += dots[n];
  }
}

template <class T>
void run(const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  const int64_t M = x.size[0], D = x.size[1], V = w.size[0];
  auto row = [](const Tensor& t, int64_t i) { return reinterpret_cast<T*>(t.data) + i * t.stride[0]; };
#pragma omp parallel for schedule(static) if (M * V * D > 200000)  // 10 us of work pay for the threads
  for (int64_t j = 0; j < V; j += kColumns) {
    const int64_t n = min(kColumns, V - j);
    Columns<T> t;
    t.D = D;
    for (int64_t i = 0; i < M; i++) t.x[i] = row(x, i);
    for (int64_t c = 0; c < kColumns; c++) t.w[c] = row(w, min(j + c, V - 1));
    memset(t.y, 0, sizeof t.y);
    for (int64_t d0 = 0; d0 < D; d0 += kBlock) {
      const int64_t d1 = min(D, d0 + kBlock);
      int64_t i = 0;
      if constexpr (kLanes >= 8)
        for (; M - i >= 8; i += 8) products<8>(t, i, d0, d1);
      for (; M - i >= 4; i += 4) products<4>(t, i, d0, d1);
      if (M - i >= 2) products<2>(t, i, d0, d1), i += 2;
      if (i < M) products<1>(t, i, d0, d1);
    }
    for (int64_t i = 0; i < M; i++)
      for (int64_t c = 0; c < n; c++)
        from_float(row(y, i) + j + c,
                   t.y[i * kColumns + c] +
                       (bias ? to_float(reinterpret_cast<const T*>(bias.data)[(j + c) * bias.stride[0]]) : 0.f));
  }
}

}  // namespace linear_fwd

// x (M <= 16, D), w (V, D), bias (V) or absent, y (M, V), all of one dtype narrower than float64; elements of a row
// adjacent.
void linear(const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  switch (x.dtype) {
    case Dtype::kFloat32:
      return linear_fwd::run<float>(x, w, bias, y);
    case Dtype::kBFloat16:
      return linear_fwd::run<bf16>(x, w, bias, y);
    default:
      return linear_fwd::run<f16>(x, w, bias, y);
  }
}

}  // namespace llmfast::cpu::LLMFAST_ISA
