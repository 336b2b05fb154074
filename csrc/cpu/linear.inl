// y = x w^T + b for 1 to 16 rows, SIMD lanes over D: w (V, D) is streamed once, as it lies, for all rows.
//
// One task is kColumns = 16 columns. A dot product is a chain by lane over kBlock = 1024 elements, summed across lanes
// by one tree and then block by block: the bits of y[i][j] depend on x[i], w[j] and b[j] alone, not on the other rows
// or the threads. kDots products (R rows x C columns x G groups of columns) are summed across lanes together. At
// most 4 columns, 4 KiB of each at a time, are read side by side: w's rows often lie a multiple of 4 KiB apart and then
// share the 8 lines of one set of L1. So x is laid out anew, the rows' vectors side by side. The block of w that comes
// next is fetched to L2 while this one is multiplied: the hardware's own fetching ends with each 4 KiB.
namespace llmfast::cpu::LLMFAST_ISA {
namespace linear_fwd {

constexpr int64_t kColumns = 16, kBlock = 1024;

template <class T>
constexpr int kStep = kLanes * kPer<T>;

template <class T>
struct Columns {
  const unit<T>* x;  // (D / kStep, M, kLanes)
  int64_t M, D;
  const T *w[kColumns], *next[kColumns];
  alignas(64) float y[16 * kColumns];  // (rows, 16)
};

// y[i + r][j] += x[i + r] . w[j] over the elements [d0, d1), for R rows and all columns; fetches the columns
// [f, f + F) of every C of the next block
template <int R, int F, class T>
LLMFAST_INLINE void products(Columns<T>& t, int64_t i, int64_t d0, int64_t d1, int f = 0) {
  constexpr int L = kLanes, C = kDots / R < 4 ? kDots / R : 4, G = kDots / (R * C);
  for (int64_t j = 0; j < kColumns; j += G * C) {
    vec acc[kDots / L][L];
    LLMFAST_UNROLL
    for (int g = 0; g < G; g++) {
      vec a[R * C] = {};
      auto step = [&](int64_t d, auto part) __attribute__((always_inline)) {
        decltype(units<T, false>(t.w[0], 0)) w[C];
        LLMFAST_UNROLL
        for (int c = 0; c < C; c++) w[c] = units<T, decltype(part)::value>(t.w[j + g * C + c] + d, t.D - d);
        LLMFAST_UNROLL
        for (int r = 0; r < R; r++) {
          const auto x = load(t.x + (d / kStep<T> * t.M + i + r) * L);
          LLMFAST_UNROLL
          for (int c = 0; c < C; c++) a[c * R + r] = product(a[c * R + r], x, w[c]);
        }
      };
      int64_t d = d0;
      for (; d + kStep<T> <= d1; d += kStep<T>) {
        LLMFAST_UNROLL
        for (int c = 0; c < F; c++) __builtin_prefetch(t.next[j + g * C + f + c] + (d - d0), 0, 2);
        step(d, std::false_type{});
      }
      if (d < d1) step(d, std::true_type{});
      LLMFAST_UNROLL
      for (int n = 0; n < R * C; n++) acc[(g * R * C + n) / L][(g * R * C + n) % L] = a[n];
    }
    alignas(64) float dots[kDots];
    LLMFAST_UNROLL
    for (int n = 0; n < kDots / L; n++) store(dots + n * L, sums<L>(acc[n]));
    for (int n = 0; n < kDots; n++) t.y[(i + n % R) * kColumns + j + n / R] += dots[n];
  }
}

template <class T>
void run(const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  constexpr int C = kDots / 4;  // columns of a tile of 4 rows
  const int64_t M = x.size[0], D = x.size[1], V = w.size[0], wide = (D + kStep<T> - 1) / kStep<T> * kStep<T>;
  auto row = [](const Tensor& t, int64_t i) { return reinterpret_cast<T*>(t.data) + i * t.stride[0]; };
  static thread_local Scratch scratch;
  unit<T>* const rows = static_cast<unit<T>*>(scratch.bytes(M * wide * (kPairs<T> ? 2 : 4)));
  for (int64_t i = 0; i < M; i++)
    for (int64_t d = 0; d < D; d += kStep<T>) {
      const auto part = D - d < kStep<T> ? units<T, true>(row(x, i) + d, D - d) : units<T, false>(row(x, i) + d, 0);
      store(rows + (d / kStep<T> * M + i) * kLanes, part);
    }
#pragma omp parallel for schedule(static) if (M * V * D > 200000)  // 10 us of work pay for the threads
  for (int64_t j = 0; j < V; j += kColumns) {
    const int64_t n = min(kColumns, V - j);
    Columns<T> t;
    t.x = rows, t.M = M, t.D = D;
    for (int64_t c = 0; c < kColumns; c++) t.w[c] = row(w, min(j + c, V - 1));
    memset(t.y, 0, sizeof t.y);
    for (int64_t d0 = 0; d0 < D; d0 += kBlock) {
      const int64_t d1 = min(D, d0 + kBlock);
      for (int64_t c = 0; c < kColumns; c++) t.next[c] = d1 < D ? t.w[c] + d1 : row(w, min(j + kColumns + c, V - 1));
      int64_t i = 0;
      for (; M - i >= 4; i += 4) {
        if (i < 4 && M < 16) {
          products<4, C>(t, i, d0, d1);
        } else if (M == 16) {
          products<4, C / 4 ? C / 4 : 1>(t, i, d0, d1, i / 4 * C / 4);
        } else {
          products<4, 0>(t, i, d0, d1);
        }
      }
      if (M - i >= 2) {
        if (i) {
          products<2, 0>(t, i, d0, d1);
        } else {
          products<2, 4>(t, i, d0, d1);
        }
        i += 2;
      }
      if (i < M) {
        if (i) {
          products<1, 0>(t, i, d0, d1);
        } else {
          products<1, 4>(t, i, d0, d1);
        }
      }
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
