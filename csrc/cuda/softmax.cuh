// y = softmax(scale x + bias) or its logarithm over the last dimension; x and y (L0, L1, M, N).
//
// Column j of row i counts when j <= i + offset and the mask is true; hidden entries become 0, or -inf in the
// logarithm, and so does a row with none. Up to N = 32768 the threads of a row hold it in registers: x is read once, y
// written once. So it is up to N = 262144 (131072 with mask, bias or unaligned rows) where blocks can form clusters:
// 2, 4 or 8 of them hold a row and exchange their maxima and sums. Beyond, and elsewhere, x is read twice.
// Backward: ds = y (dy - sum(y dy)), of the logarithm ds = dy - e^y sum(dy); dx = scale ds. y and dy are read once up
// to N = 16384 (8192 unaligned), aligned rows up to 262144 in clusters, y in registers and dy in shared memory; else
// twice. Every reduction has one order, whatever else is in the batch.
#pragma once
#include "views.cuh"

namespace llmfast::cuda {

constexpr int kRowsPerBlock = 4;                   // of one warp each
constexpr int kRowBytes = 2 * 32 * sizeof(float);  // shared memory: a result of each warp, of two reductions

struct Row {
  char *x, *y, *mask, *bias;  // first column; mask and bias may be absent
  int64_t visible;            // columns [0, visible) count unless masked
};

template <class T>
__device__ __forceinline__ Row row_of(const Softmax& a, int64_t index) {
  const int64_t i = index % a.x.size[2], l = index / a.x.size[2], l0 = l / a.x.size[1], l1 = l % a.x.size[1];
  const int64_t past = i + a.offset + 1;
  const auto first = [&](const Tensor& t, int bytes) {
    return t.data ? t.data + (l0 * t.stride[0] + l1 * t.stride[1] + i * t.stride[2]) * bytes : nullptr;
  };
  return {first(a.x, sizeof(T)), first(a.y, sizeof(T)), first(a.mask, 1),
          first(a.bias, a.bias.dtype == Dtype::kFloat32 ? 4 : 2),
          past < 0             ? 0
          : past < a.x.size[3] ? past
                               : a.x.size[3]};
}

// scale x + bias, -inf where masked.
template <bool kExtras>
__device__ __forceinline__ float score(const Softmax& a, const Row& row, int64_t j, float x) {
  float s = x * static_cast<float>(a.scale);
  if constexpr (kExtras) {
    if (row.bias) s += float_at(row.bias, a.bias.dtype, j * a.bias.stride[3]);
    if (row.mask && !row.mask[j * a.mask.stride[3]]) s = -kInf;
  }
  return s;
}

// e^(s - m), 0 in a row that sees nothing; s - m is rounded before the base changes, so no digit is lost to a large m.
__device__ __forceinline__ float exponential(float s, float m) {
  return exp2_approx((s - (m == -kInf ? 0.f : m)) * kLog2e);
}

// The maximum or sum over the threads of a row; each block-wide reduction of a kernel has its own 32 floats of shared
// memory.
template <int kThreads, class Op>
__device__ __forceinline__ float reduce(float x, int slot, Op op) {
#pragma unroll
  for (int lanes = FAULT == 11 ? 8 : 16; lanes; lanes /= 2) x = op(x, shuffle_xor(x, lanes));
  if constexpr (kThreads > 32) {
    float* partial = reinterpret_cast<float*>(shared_memory()) + 32 * slot;
    const int lane = thread_index() % 32;
    if (lane == 0) partial[thread_index() / 32] = x;
    if (FAULT != 12) block_barrier();
    x = partial[lane % (kThreads / 32)];
#pragma unroll
    for (int lanes = kThreads / 64; lanes; lanes /= 2) x = op(x, shuffle_xor(x, lanes));
  }
  return x;
}

template <int kThreads>
__device__ __forceinline__ float row_max(float x) {
  return reduce<kThreads>(x, 0, [](float a, float b) { return fmaxf(a, b); });
}
template <int kThreads>
__device__ __forceinline__ float row_sum(float x) {
  return reduce<kThreads>(x, FAULT == 13 ? 0 : 1, [](float a, float b) { return a + b; });
}

// A thread's scores of a row, where column(c) is the first of each group, and their maximum.
template <bool kPlain, class T, int kGroups, int kWidth, class Column>
__device__ __forceinline__ float take(const Softmax& a, const Row& row, const T* x, Column column,
                                      float (&s)[kGroups][kWidth]) {
  float m = -kInf;
#pragma unroll
  for (int c = 0; c < kGroups; c++) {
    const int64_t j = column(c);
    if (j < row.visible) Columns<T, 32, (kWidth > 1)>::load(s[c], x + j);
#pragma unroll
    for (int e = 0; e < kWidth; e++) {
      s[c][e] = j + e < row.visible ? score<!kPlain>(a, row, j + e, s[c][e]) : -kInf;
      m = fmaxf(m, s[c][e]);
    }
  }
  return m;
}

// The sum of e^(s - m), which takes the place of s unless the logarithm is wanted.
template <int kGroups, int kWidth>
__device__ __forceinline__ float to_exponentials(float (&s)[kGroups][kWidth], float m, bool log) {
  float l = 0.f;
#pragma unroll
  for (int c = 0; c < kGroups; c++)
#pragma unroll
    for (int e = 0; e < kWidth; e++) {
      const float p = exponential(s[c][e], m);
      l += p;
      if (!log) s[c][e] = p;
    }
  return l;
}

// kThreads threads hold a row, kItems values each; 32 threads: kRowsPerBlock rows a block, else one. 32 items of 1024
// threads are 32768 columns in 32 of the 64 registers a thread of 1024 may have. kPlain: aligned rows, no mask, no
// bias.
template <class T, int kThreads, int kItems, bool kPlain>
__global__ void __launch_bounds__(kThreads == 32 ? 32 * kRowsPerBlock : kThreads)
    softmax_rows(const __grid_constant__ Softmax a) {
  note_shared<kThreads == 32 ? 0 : kRowBytes>();
  using C = Columns<T, kThreads, kPlain>;
  constexpr int kGroups = kItems / C::kWidth;
  static_assert(kItems % C::kWidth == 0, "a thread holds whole vectors");
  const int64_t index = kThreads == 32 ? block_index() * kRowsPerBlock + thread_index() / 32 : block_index();
  if (index >= a.x.size[0] * a.x.size[1] * a.x.size[2]) return;
  const Row row = row_of<T>(a, index);
  const T* x = reinterpret_cast<const T*>(row.x);
  T* y = reinterpret_cast<T*>(row.y);
  const int64_t N = a.x.size[3];
  const int t = thread_index() % kThreads;

  const auto column = [&](int c) { return C::first(c, t); };
  float s[kGroups][C::kWidth];
  const float m = row_max<kThreads>(take<kPlain>(a, row, x, column, s));
  const float l = row_sum<kThreads>(to_exponentials(s, m, a.log));
  const float inverse = l == 0.f ? 0.f : 1.f / l, lse = l == 0.f ? 0.f : m + logf(l);
#pragma unroll
  for (int c = 0; c < kGroups; c++) {
    const int64_t j = column(c);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) s[c][e] = a.log ? s[c][e] - lse : s[c][e] * inverse;
    if (FAULT == 14 ? j <= N : j < N) C::store(y + j, s[c]);
  }
}

constexpr int kClusterBlocks = 8;   // at most: what every GPU that has clusters can run
constexpr int kClusterItems = 32;   // of a thread, as in softmax_rows
constexpr int kClusterStart = 512;  // bytes of shared memory for partial results; dy of the backward follows
template <class T>
constexpr int kClusterBytes = kClusterStart + 1024 * kClusterItems * static_cast<int>(sizeof(T));

// Where a block leaves its results for the others, behind those of its warps.
__device__ __forceinline__ float* for_cluster() { return reinterpret_cast<float*>(shared_memory() + kRowBytes); }
// What each block of the cluster left at p, in the lanes of its rank modulo 8; `none` beyond the cluster.
__device__ __forceinline__ float of_block(const float* p, float none) {
  const int rank = thread_index() % kClusterBlocks;
  return rank < cluster_size() ? load_remote(p, rank) : none;
}
template <class Op>
__device__ __forceinline__ float over_blocks(float x, Op op) {
#pragma unroll
  for (int lanes = kClusterBlocks / 2; lanes; lanes /= 2) x = op(x, shuffle_xor(x, lanes));
  return x;
}

// As softmax_rows, of a row that a cluster of blocks holds. Each takes exponentials against its own maximum, so that
// there is one exchange, of maximum and sum.
template <class T, int kItems, bool kPlain>
__global__ void __launch_bounds__(1024) softmax_cluster_rows(const __grid_constant__ Softmax a) {
  note_shared<kClusterStart>();
  using C = Columns<T, 1024, kPlain>;
  constexpr int kGroups = kItems / C::kWidth;
  const int blocks = cluster_size(), t = thread_index();
  const Row row = row_of<T>(a, block_index() / blocks);
  const T* x = reinterpret_cast<const T*>(row.x);
  T* y = reinterpret_cast<T*>(row.y);
  const int64_t N = a.x.size[3];
  const auto column = [&](int c) { return C::first(c * blocks + (FAULT == 16 ? 0 : cluster_rank()), t); };

  float s[kGroups][C::kWidth];
  const float m = row_max<1024>(take<kPlain>(a, row, x, column, s));
  float l = row_sum<1024>(to_exponentials(s, m, a.log));
  float* const mine = for_cluster();
  if (t == 0) mine[0] = m, mine[1] = l;
  if (FAULT != 17) cluster_arrive(), cluster_wait();
  const float m_block = of_block(mine, -kInf), l_block = of_block(mine + 1, 0.f);
  if (FAULT != 18) cluster_arrive();  // no block may end, and its shared memory with it, before all have read
  const float m_row = over_blocks(m_block, [](float a, float b) { return fmaxf(a, b); });
  l = over_blocks(l_block * (FAULT == 19 ? 1 : exponential(m_block, m_row)), [](float a, float b) { return a + b; });
  const float factor = l == 0.f ? 0.f : exponential(m, m_row) / l, lse = l == 0.f ? 0.f : m_row + logf(l);
#pragma unroll
  for (int c = 0; c < kGroups; c++) {
    const int64_t j = column(c);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) s[c][e] = a.log ? s[c][e] - lse : s[c][e] * factor;
    if (FAULT == 20 ? j <= N : j < N) C::store(y + j, s[c]);
  }
  if (FAULT != 18) cluster_wait();
}

// Rows longer than registers hold: a running maximum and sum in each thread, merged, then a second read.
template <class T, bool kPlain>
__global__ void __launch_bounds__(1024) softmax_long_rows(const __grid_constant__ Softmax a) {
  note_shared<kRowBytes>();
  using C = Columns<T, 1024, kPlain>;
  const Row row = row_of<T>(a, block_index());
  const T* x = reinterpret_cast<const T*>(row.x);
  T* y = reinterpret_cast<T*>(row.y);
  const int64_t N = a.x.size[3];
  const int t = thread_index();

  const auto scores = [&](float (&s)[C::kWidth], int64_t j) {
    if (j < row.visible) C::load(s, x + j);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) s[e] = j + e < row.visible ? score<!kPlain>(a, row, j + e, s[e]) : -kInf;
  };
  float m = -kInf, l = 0.f;
  for (int64_t c = 0, j; (j = C::first(c, t)) < row.visible; c++) {
    float s[C::kWidth], m_new = m, sum = 0.f;
    scores(s, j);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) m_new = fmaxf(m_new, s[e]);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) sum += exponential(s[e], m_new);
    l = (FAULT == 15 ? l : l * exponential(m, m_new)) + sum;
    m = m_new;
  }
  const float m_row = row_max<1024>(m);
  l = row_sum<1024>(l * exponential(m, m_row));
  const float inverse = l == 0.f ? 0.f : 1.f / l, lse = l == 0.f ? 0.f : m_row + logf(l);
  for (int64_t c = 0, j; (j = C::first(c, t)) < N; c++) {
    float s[C::kWidth];
    scores(s, j);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) s[e] = a.log ? s[e] - lse : exponential(s[e], m_row) * inverse;
    C::store(y + j, s);
  }
}

// What a pair contributes to the sum of its row, and ds from that sum; hidden entries of a logarithm have no gradient.
__device__ __forceinline__ float term(bool log, float y, float dy) { return log ? (y == -kInf ? 0.f : dy) : y * dy; }
__device__ __forceinline__ float gradient(bool log, float y, float dy, float sum) {
  return log ? term(log, y, dy) - exp2_approx(y * kLog2e) * sum : y * (dy - sum);
}

template <class T>
struct BackwardRows {
  const T *y, *dy;
  T* dx;
};
template <class T>
__device__ __forceinline__ BackwardRows<T> rows_of(const SoftmaxBackward& a, int64_t index) {
  const int64_t i = index % a.y.size[2], l = index / a.y.size[2], l0 = l / a.y.size[1], l1 = l % a.y.size[1];
  return {at<const T>(a.y, l0, l1, i), at<const T>(a.dy, l0, l1, i), at<T>(a.dx, l0, l1, i)};
}

// As softmax_rows, over dy and y.
template <class T, int kThreads, int kItems, bool kAligned>
__global__ void __launch_bounds__(kThreads == 32 ? 32 * kRowsPerBlock : kThreads)
    softmax_bwd_rows(const __grid_constant__ SoftmaxBackward a) {
  note_shared<kThreads == 32 ? 0 : kRowBytes>();
  using C = Columns<T, kThreads, kAligned>;
  constexpr int kGroups = kItems / C::kWidth;
  const int64_t index = kThreads == 32 ? block_index() * kRowsPerBlock + thread_index() / 32 : block_index();
  if (index >= a.y.size[0] * a.y.size[1] * a.y.size[2]) return;
  const auto [y, dy, dx] = rows_of<T>(a, index);
  const int64_t N = a.y.size[3];
  const int t = thread_index() % kThreads;

  float ys[kGroups][C::kWidth] = {}, dys[kGroups][C::kWidth] = {}, sum = 0.f;
#pragma unroll
  for (int c = 0; c < kGroups; c++) {
    const int64_t j = C::first(c, t);
    if (j < N) C::load(ys[c], y + j), C::load(dys[c], dy + j);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) sum += term(a.log, ys[c][e], dys[c][e]);
  }
  if (FAULT != 21) sum = row_sum<kThreads>(sum);
#pragma unroll
  for (int c = 0; c < kGroups; c++) {
    const int64_t j = C::first(c, t);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++)
      ys[c][e] = static_cast<float>(a.scale) * gradient(a.log, ys[c][e], dys[c][e], sum);
    if (j < N + (FAULT == 22)) C::store(dx + j, ys[c]);
  }
}

// As softmax_bwd_rows, of an aligned row that a cluster of blocks holds: y in registers, dy in shared memory, where
// each thread reads what it brought.
template <class T>
__global__ void __launch_bounds__(1024) softmax_bwd_cluster_rows(const __grid_constant__ SoftmaxBackward a) {
  note_shared<kClusterBytes<T>>();
  using C = Columns<T, 1024, true>;
  constexpr int kGroups = kClusterItems / C::kWidth;
  const int blocks = cluster_size(), t = thread_index();
  const auto [y, dy, dx] = rows_of<T>(a, block_index() / blocks);
  const int N = a.y.size[3], first = C::first(cluster_rank(), t), step = C::first(blocks, 0);
  const auto column = [&](int c) { return first + c * step; };
  char* const mine = shared_memory() + kClusterStart;
  const auto held = [&](int c) { return reinterpret_cast<T*>(mine + (c * 1024 + t) * 16); };

#pragma unroll
  for (int c = 0; c < kGroups; c++)
    if (column(c) < N) cp_async_16(shared_address(held(c)), dy + column(c), 16);
  cp_async_commit();
  float ys[kGroups][C::kWidth] = {}, sum = 0.f;
#pragma unroll
  for (int c = 0; c < kGroups; c++)
    if (column(c) < N) C::load(ys[c], y + column(c));
  if (FAULT == 23)
    cp_async_wait<1>();
  else
    cp_async_wait<0>();
#pragma unroll
  for (int c = 0; c < kGroups; c++) {
    if (column(c) >= N) continue;
    float dys[C::kWidth];
    C::load(dys, held(c));
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) sum += term(a.log, ys[c][e], dys[e]);
  }
  sum = row_sum<1024>(sum);
  float* const block_sum = for_cluster();
  if (t == 0) *block_sum = sum;
  if (FAULT != 24) cluster_arrive(), cluster_wait();
  sum = of_block(block_sum, 0.f);
  if (FAULT != 25) cluster_arrive();  // as in softmax_cluster_rows
  sum = over_blocks(sum, [](float a, float b) { return a + b; });
#pragma unroll
  for (int c = 0; c < kGroups; c++) {
    const int j = column(c);
    if (j >= N + (FAULT == 26)) continue;
    float dys[C::kWidth];
    C::load(dys, held(c));
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) dys[e] = static_cast<float>(a.scale) * gradient(a.log, ys[c][e], dys[e], sum);
    C::store(dx + j, dys);
  }
  if (FAULT != 25) cluster_wait();
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(1024) softmax_bwd_long_rows(const __grid_constant__ SoftmaxBackward a) {
  note_shared<kRowBytes>();
  using C = Columns<T, 1024, kAligned>;
  const auto [y, dy, dx] = rows_of<T>(a, block_index());
  const int64_t N = a.y.size[3];
  const int t = thread_index();

  float ys[C::kWidth], dys[C::kWidth], sum = 0.f;
  for (int64_t c = 0, j; (j = C::first(c, t)) < N; c++) {
    C::load(ys, y + j), C::load(dys, dy + j);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) sum += term(a.log, ys[e], dys[e]);
  }
  sum = row_sum<1024>(sum);
  for (int64_t c = 0, j; (j = C::first(c, t)) < N; c++) {
    C::load(ys, y + j), C::load(dys, dy + j);
#pragma unroll
    for (int e = 0; e < C::kWidth; e++) ys[e] = static_cast<float>(a.scale) * gradient(a.log, ys[e], dys[e], sum);
    C::store(dx + j, ys);
  }
}

}  // namespace llmfast::cuda
