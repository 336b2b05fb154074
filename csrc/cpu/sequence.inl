// What the attention kernels share: a sequence's rows and keys, where a key's row lies, and the unit of a product.
namespace llmfast::cpu::LLMFAST_ISA {

LLMFAST_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

LLMFAST_INLINE int64_t length(const Tensor& t, int64_t i) {
  return reinterpret_cast<const int32_t*>(t.data)[i * t.stride[0]];
}

// A head dim to whole vectors of any instruction set, pairs included.
constexpr int64_t wide(int64_t D) { return (D + 31) / 32 * 32; }

// Rows [q0, q0 + Nq) and keys [k0, k0 + Nk) of row `batch`; b counts sequences. Lengths are clamped to what is there.
struct Sequence {
  int64_t b, batch, q0, Nq, k0, Nk;
};

LLMFAST_INLINE int64_t sequences(const Tensor& q, const Extras& e) {
  return e.cu_seqlens_q ? e.cu_seqlens_q.size[0] - 1 : q.size[0];
}

LLMFAST_INLINE Sequence sequence(const Tensor& q, const Tensor& k, const Extras& e, int64_t b) {
  Sequence s{b, b, 0, q.size[2], 0, k.size[2]};
  if (e.cu_seqlens_q) {
    s.batch = 0;
    s.q0 = clamp(length(e.cu_seqlens_q, b), 0, q.size[2]), s.k0 = clamp(length(e.cu_seqlens_k, b), 0, k.size[2]);
    s.Nq = clamp(length(e.cu_seqlens_q, b + 1), s.q0, q.size[2]) - s.q0;
    s.Nk = clamp(length(e.cu_seqlens_k, b + 1), s.k0, k.size[2]) - s.k0;
  }
  if (e.page_table) s.Nk *= e.page_table.size[1];
  if (e.seqlens_k) s.Nk = clamp(length(e.seqlens_k, b), 0, s.Nk);
  return s;
}

// The rows of k or v of one sequence and head, whole or in pages.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  const int32_t* pages;
  int64_t table_stride, page_stride, size, count;

  const T* at(int64_t j) const {
    if (!pages) return data + j * stride;
    return data + clamp(pages[j / size * table_stride], 0, count - 1) * page_stride + j % size * stride;
  }
};

template <class T>
LLMFAST_INLINE Rows<T> rows(const Tensor& t, const Extras& e, const Sequence& s, int64_t head) {
  const T* data = reinterpret_cast<const T*>(t.data) + head * t.stride[1] + s.k0 * t.stride[2];
  if (!e.page_table) return {data + s.batch * t.stride[0], t.stride[2], nullptr, 0, 0, 1, 1};
  const int32_t* pages = reinterpret_cast<const int32_t*>(e.page_table.data) + s.b * e.page_table.stride[0];
  return {data, t.stride[2], pages, e.page_table.stride[1], t.stride[0], t.size[2], t.size[0]};
}

// One element of a tensor of any dtype, at an offset in elements.
template <class C>
LLMFAST_INLINE C element(const Tensor& t, int64_t at) {
  switch (t.dtype) {
    case Dtype::kFloat32:
      return reinterpret_cast<const float*>(t.data)[at];
    case Dtype::kBFloat16:
      return to_float(reinterpret_cast<const bf16*>(t.data)[at]);
    case Dtype::kFloat16:
      return to_float(reinterpret_cast<const f16*>(t.data)[at]);
    case Dtype::kBool:
      return reinterpret_cast<const uint8_t*>(t.data)[at];
    default:
      return static_cast<C>(reinterpret_cast<const double*>(t.data)[at]);
  }
}

// A row of n elements widened to the compute type; to has room for whole vectors.
template <class T>
LLMFAST_INLINE void widen(const T* from, int64_t n, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(to + d, loadu(from + d));
  if (d < n) store(to + d, load_part(from + d, n - d));
}
LLMFAST_INLINE void widen(const double* from, int64_t n, double* to) {
  for (int64_t d = 0; d < n; d++) to[d] = from[d];
}

// float32 for everything narrower than float64.
template <class T>
using compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr bool kPairs = std::is_same_v<T, bf16> && kDotBf16;
template <class T>  // what one step of a product takes of q, k, p or v
using unit = std::conditional_t<kPairs<T>, int32_t, compute<T>>;
template <class T>  // keys or head dims in a unit
constexpr int kPer = kPairs<T> ? 2 : 1;

template <class U>
LLMFAST_INLINE U read(const char* p, int64_t i) {
  U x;
  __builtin_memcpy(&x, p + i * sizeof(U), sizeof(U));
  return x;
}
template <class C>
LLMFAST_INLINE vec_of<C> multiply_add(vec_of<C> acc, C x, vec_of<C> y) {
  return acc + splat(x) * y;
}
template <class C>
LLMFAST_INLINE vec multiply_add(vec acc, int32_t x, ivec y) {
  return dot(acc, splat(x), y);
}

// acc[v] += x y[v], x the unit at p: a row of a tile. On AVX2 12 accumulators, 2 vectors and a broadcast are 15 of 16
// registers, and g++ 12 left to itself spills an accumulator inside the loop. (Sanitizers see no read by an asm.)
template <class C, class U, int V, class Y>
LLMFAST_INLINE void multiply_add_row(vec_of<C> (&acc)[V], const char* p, const Y (&y)[V]) {
#if LLMFAST_LANES == 8 && defined(__OPTIMIZE__)
  if constexpr (V == 2 && std::is_same_v<U, C>) {
    vec_of<C> x, first = acc[0], second = acc[1];
    const vec_of<C> y0 = y[0], y1 = y[1];
    if constexpr (std::is_same_v<C, float>) {
      asm("vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1"
          : "+x"(first), "+x"(second), "=&x"(x)
          : "m"(*reinterpret_cast<const C*>(p)), "x"(y0), "x"(y1));
    } else {
      asm("vbroadcastsd %3, %2\n\tvfmadd231pd %4, %2, %0\n\tvfmadd231pd %5, %2, %1"
          : "+x"(first), "+x"(second), "=&x"(x)
          : "m"(*reinterpret_cast<const C*>(p)), "x"(y0), "x"(y1));
    }
    acc[0] = first, acc[1] = second;
    return;
  }
#endif
  const U x = read<U>(p, 0);
  LLMFAST_UNROLL
  for (int v = 0; v < V; v++) acc[v] = multiply_add<C>(acc[v], x, y[v]);
}

// A vector of T as the products take it: pairs, or widened; the last one of a row holds n elements.
template <class T, bool kPart>
LLMFAST_INLINE auto units(const T* p, int64_t n) {
  if constexpr (kPairs<T>) {
    if constexpr (kPart) return load_pairs_part(p, n);
    return loadu(reinterpret_cast<const int32_t*>(p));
  } else {
    if constexpr (kPart) return load_part(p, n);
    return loadu(p);
  }
}
LLMFAST_INLINE vec product(vec acc, vec x, vec y) { return acc + x * y; }
LLMFAST_INLINE dvec product(dvec acc, dvec x, dvec y) { return acc + x * y; }
LLMFAST_INLINE vec product(vec acc, ivec x, ivec y) { return dot(acc, x, y); }

LLMFAST_INLINE float log(float x) { return __builtin_logf(x); }
LLMFAST_INLINE double log(double x) { return __builtin_log(x); }
LLMFAST_INLINE float exp(float x) { return __builtin_expf(x); }
LLMFAST_INLINE double exp(double x) { return __builtin_exp(x); }
LLMFAST_INLINE void from_float(double* p, double x) { *p = x; }

}  // namespace llmfast::cpu::LLMFAST_ISA
