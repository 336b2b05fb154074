// Attention of a few queries against a long key-value cache, o = softmax(scale q k^T) v, split over keys, on tensor
// cores (mma.sync, sm_80 on).
//
// A row is one query of one of the heads that share a key head: rows of a group lie heads outside, queries inside. One
// block is 16 rows and one split of the keys that some query sees; each of its 4 warps goes over its own 16 keys of
// every 64, k and v passing through a ring of its own, and the four results meet in shared memory. The last block of a
// row tile to finish merges the splits in key order, by the same formula. Where a split ends depends on Nq, the keys of
// the sequence and the band alone, so a sequence's bits don't depend on its neighbours or on who finishes last. The
// cache is (B, Hk, M, D) or pages (P, Hk, page, D) found through page_table (B, pages). Reads the visible keys once for
// each 16 rows, writes and reads rows * (Dv + 2) floats a split.
#pragma once
#include "attention_forward.cuh"

namespace llmfast::cuda {

// The problem as the kernel takes it: mask and bias with 4 dimensions.
struct AttentionDecodeArgs {
  AttentionForward p;
  Tensor parts, sums;  // float32 (splits, B H Nq, Dv rounded up to 8) and (splits, B H Nq, 2): acc, and m and l
  Tensor counters;     // int32 (B Hk tiles), zero before and after: splits of a row tile that are finished
  int tiles, splits;   // row tiles of a key head; as many splits as there is room for
  bool aligned_o, general;
};

// 64 KiB of ring at most. Up to head dim 128 three blocks of at most 168 registers a thread, four of 128 at 32, keep
// over 96 KiB on their way on an SM of sm_90, which its memory's delay asks for. Beyond it acc alone is 96 or 128
// registers, and two blocks keep 48 or 64 KiB.
template <int kHeadDim>
struct DecodeTile {
  using Rows = Tile<kHeadDim, false>;  // layout of a row in shared memory
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16, kKeys = 16, BLOCK_N = kKeys * kWarps;
  static constexpr int kSplitKeys = 256;  // at least: 16 rows of partial results are 1 / 16 of the keys' bytes
  static constexpr int kSlotBytes = kKeys * kHeadDim * 2, kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kRing = kHeadDim <= 64 ? 8 : kHeadDim <= 128 ? 65536 / (kSlotBytes * kWarps) : 2;
  static constexpr int kRingBytes = kRing * kSlotBytes;  // of a warp; its acc takes the ring's place at the end
  static constexpr int kSums = kQueryBytes + kWarps * kRingBytes, kSharedBytes = kSums + kWarps * kRows * 8 + 16;
  static_assert(kRingBytes >= kRows * kHeadDim * 4, "acc is float32");
  static_assert(kSharedBytes <= 101376, "99 KiB of sm_120");

  // Byte offset of four columns of acc; 16-byte chunks are XOR-swizzled as rows of the tiles are.
  __device__ __forceinline__ static int acc_offset(int warp, int row, int chunk) {
    return kQueryBytes + warp * kRingBytes + (row * (kHeadDim / 4) + (chunk ^ (row & 7))) * 16;
  }
};

// 8 columns of one row.
struct Columns8 {
  float x[8];

  __device__ __forceinline__ void load(const char* first, const char* second) {
    const uint4 bits[2] = {load_128(first), load_128(second)};
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = reinterpret_cast<const float*>(bits)[i];
  }
};

// The first n partial results of a row in key order: sum(k, m, l) gives one's maximum and sum, columns(k) its acc. c
// takes m to base-2 units; a part that saw no key has m = -inf.
template <class Sum, class Columns>
__device__ __forceinline__ Columns8 merged(int n, float c, Sum sum, Columns columns, float& m, float& l) {
  Columns8 r{};
  m = -kInf, l = 0.f;
#pragma unroll 4
  for (int k = 0; k < n; k++) {
    float m_part, l_part;
    sum(k, m_part, l_part);
    m = fmaxf(m, m_part);
  }
  const float m_safe = m == -kInf ? 0.f : m;
#pragma unroll 4
  for (int k = 0; k < n; k++) {
    float m_part, l_part;
    sum(k, m_part, l_part);
    const float alpha = exp2_approx((m_part - m_safe) * c);
    const Columns8 part = columns(k);
    l += l_part * alpha;
#pragma unroll
    for (int i = 0; i < 8; i++) r.x[i] += part.x[i] * alpha;
  }
  return r;
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(DecodeTile<kHeadDim>::kThreads)
    attention_decode(const __grid_constant__ AttentionDecodeArgs a) {
  using Tile = DecodeTile<kHeadDim>;
  note_shared<Tile::kSharedBytes>();
  using Rows = typename Tile::Rows;
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys, BLOCK_N = Tile::BLOCK_N, kRing = Tile::kRing;
  constexpr int kChunks = Rows::kChunks;
  const AttentionForward& p = a.p;
  const Tensor& table = p.extras.page_table;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int H = p.q.size[1], Hk = p.k.size[1], Nq = p.q.size[2], D = p.q.size[3], Dv = p.v.size[3];
  const int tile = block_index() % a.tiles, split = block_index() / a.tiles % a.splits;
  const int64_t head = block_index() / a.tiles / a.splits;  // of all sequences
  const int b = head / Hk, hk = head % Hk, rows = H / Hk * Nq, row0 = tile * kRows;
  const int page = p.k.size[2], P = p.k.size[0];
  const int M = table.data ? (P ? page * static_cast<int>(table.size[1]) : 0) : page;
  int Nk = M;
  if (p.extras.seqlens_k.data) {
    Nk = max(*at<int>(p.extras.seqlens_k, b), 0);
    if (FAULT != 70) Nk = min(Nk, M);
  }

  // Query i sees keys [i + low, i + high), and of those [0, Nk).
  constexpr int64_t kFar = 1 << 30;  // further than any key: i + low and i + high fit an int
  const int low = max(-kFar, min(kFar, Nk - Nq - p.spec.left)),
            high = max(-kFar, min(kFar, Nk - Nq + p.spec.right + 1));
  const auto clamped = [&](int j) { return max(0, min(j, Nk)); };
  const int begin = clamped(low), end = max(begin, clamped(Nq - 1 + high));
  const int share = ((end - begin + a.splits - 1) / a.splits + BLOCK_N - 1) / BLOCK_N * BLOCK_N;
  const int keys = max(share, Tile::kSplitKeys);             // of a split
  const int used = max((end - begin + keys - 1) / keys, 1);  // splits of this sequence
  if (split >= used) return;
  const int first = begin + split * keys, last = min(first + keys, end);

  const T *k = at<const T>(p.k, 0, hk), *v = at<const T>(p.v, 0, hk);
  const uint32_t q_tile = shared_address(shared_memory()), ring = q_tile + Tile::kQueryBytes + warp * Tile::kRingBytes;
  const int q_lane = Rows::offset(lane % 16, lane / 16), v_lane = q_lane;
  const int k_lane = Rows::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const int first_key = first + warp * kKeys;  // of this warp, which goes on in steps of BLOCK_N
  const int steps = last > first_key ? 2 * ((last - first_key + BLOCK_N - 1) / BLOCK_N) : 0;  // tiles of k and v

  // Where key lane % 16 of the next tile lies: looked up a tile ahead.
  int block = b, n = 0;
  const auto find = [&](int n0) {
    const int j = n0 + lane % kKeys;
    n = j;
    if (table.data && (FAULT == 67 ? j <= last : j < last)) {
      block = *at<int>(table, b, j / page), n = j % page;
      block = max(0, min(block, FAULT == 66 ? P : P - 1));
    }
  };
  const auto load = [&](int step, int slot) {
    if (step < steps) {
      const bool is_k = step % 2 == 0;
      const T* x = is_k ? k : v;
      const int64_t outer = is_k ? p.k.stride[0] : p.v.stride[0], inner = is_k ? p.k.stride[2] : p.v.stride[2];
      const int n0 = first_key + step / 2 * BLOCK_N;
#pragma unroll 4
      for (int i = 0; i < kKeys * kChunks / 32; i++) {
        const int row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
        const int left = ((is_k ? D : Dv) - chunk * 8) * 2, inside = n0 + row < last && left > 0;
        const int64_t offset = shuffle(block, row) * outer + shuffle(n, row) * inner + chunk * 8;
        cp_async_16(ring + slot * Tile::kSlotBytes + Rows::offset(row, chunk), inside ? x + offset : x,
                    inside ? left < 16 ? left : 16 : 0);
      }
      if (!is_k) find(n0 + BLOCK_N);
    }
    cp_async_commit();
  };
  for (int index = thread_index(); index < kRows * kChunks; index += Tile::kThreads) {
    const int row = index / kChunks, chunk = index % kChunks, r = row0 + row;
    const int left = (D - chunk * 8) * 2, inside = r < rows && left > 0;
    const T* q = at<const T>(p.q, b, hk * (H / Hk) + r / Nq, r % Nq);
    cp_async_16(q_tile + Rows::offset(row, chunk), inside ? q + chunk * 8 : at<const T>(p.q, 0),
                inside ? left < 16 ? left : 16 : 0);
  }
  cp_async_commit();
  if (steps) find(first_key);
#pragma unroll 1
  for (int step = 0; step < kRing - 1; step++) load(step, step);
  cp_async_wait<kRing - 1>();
  block_barrier();

  int h[2], i[2], from[2], to[2];  // of rows lane / 4 and lane / 4 + 8: head, query, keys it sees in this split
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = row0 + lane / 4 + r * 8;
    h[r] = hk * (H / Hk) + row / Nq, i[r] = row % Nq;
    from[r] = clamped(i[r] + low), to[r] = row < rows ? min(clamped(i[r] + high + (FAULT == 68)), last) : 0;
  }
  float acc[kHeadDim / 8][4] = {};  // (16, Dv): rows lane / 4 (+ 8), columns lane % 4 * 2 (+ 1) of each 16 x 8
  float m[2] = {-kInf, -kInf}, l[2] = {};
  const float scale = a.general ? 1.f : static_cast<float>(p.spec.scale);  // what s still lacks; positive
  const float c = scale * kLog2e;                                          // s to base-2 units

  int slot = 0;
  // Waits for the next tile and starts the one that takes the slot of the tile before it; returns the tile's address.
  const auto next = [&](int step) {
    FAULT == 61 ? cp_async_wait<kRing - 1>() : cp_async_wait<kRing - 2>();
    if (FAULT != 72) warp_barrier();
    const uint32_t address = ring + slot * Tile::kSlotBytes;
    load(step + kRing - 1, FAULT == 71 ? slot : slot == 0 ? kRing - 1 : slot - 1);
    slot = slot == kRing - 1 ? 0 : slot + 1;
    return address;
  };
  for (int step = 0; step < steps; step += 2) {
    const uint32_t k_tile = next(step);
    float s[kKeys / 8][4] = {};  // (16, 16)
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; d++) {
      uint32_t q_part[4], k_part[4];
      ldmatrix_x4(q_part, Rows::advance(q_tile + q_lane, d));
      ldmatrix_x4(k_part, Rows::advance(k_tile + k_lane, d));
      mma_m16n8k16<T>(s[0], q_part, k_part[0], k_part[1]);
      mma_m16n8k16<T>(s[1], q_part, k_part[2], k_part[3]);
    }
    const int column0 = first_key + step / 2 * BLOCK_N + lane % 4 * 2;
#pragma unroll
    for (int t = 0; t < kKeys / 8; t++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int r = e / 2, j = column0 + t * 8 + e % 2;
        const bool seen = j >= from[r] && j < to[r];
        if (a.general && seen) {
          float derivative;
          s[t][e] = score_of(
              s[t][e], p.spec, p.extras, b, h[r], i[r], j, [&] { return slope_of(p.extras.alibi_slopes, b, h[r]); },
              i[r] + Nk - Nq - j, derivative);
        }
        if (!seen) s[t][e] = -kInf;
      }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float m_new = m[r];
#pragma unroll
      for (int t = 0; t < kKeys / 8; t++) m_new = fmaxf(m_new, fmaxf(s[t][r * 2], s[t][r * 2 + 1]));
      m_new = fmaxf(m_new, shuffle_xor(m_new, 1));
      m_new = fmaxf(m_new, shuffle_xor(m_new, 2));
      const float m_safe = m_new == -kInf ? 0.f : m_new, base = m_safe * c;
      const float alpha = exp2_approx((m[r] - m_safe) * c);
      float sum = 0.f;
#pragma unroll
      for (int t = 0; t < kKeys / 8; t++)
#pragma unroll
        for (int e = 0; e < 2; e++) sum += s[t][r * 2 + e] = exp2_approx(s[t][r * 2 + e] * c - base);
      m[r] = m_new;
      l[r] = l[r] * alpha + sum;
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; d++) acc[d][r * 2] *= alpha, acc[d][r * 2 + 1] *= alpha;
    }
    uint32_t probabilities[4];
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int r = 0; r < 2; r++) probabilities[t * 2 + r] = pack<T>(s[t][r * 2], s[t][r * 2 + 1]);

    const uint32_t v_tile = next(step + 1);
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; d++) {
      uint32_t v_part[4];
      ldmatrix_x4_trans(v_part, Rows::advance(v_tile + v_lane, d));
      mma_m16n8k16<T>(acc[2 * d], probabilities, v_part[0], v_part[1]);
      mma_m16n8k16<T>(acc[2 * d + 1], probabilities, v_part[2], v_part[3]);
    }
  }

  // acc of the warp takes the place of its ring.
  float* const warp_sums = reinterpret_cast<float*>(shared_memory() + Tile::kSums);  // (4, 16, 2): m and l
  warp_barrier();
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = lane / 4 + r * 8;
    l[r] += shuffle_xor(l[r], 1);
    l[r] += shuffle_xor(l[r], 2);
    if (lane % 4 == 0) warp_sums[(warp * kRows + row) * 2] = m[r], warp_sums[(warp * kRows + row) * 2 + 1] = l[r];
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; d++) {
      float* to = reinterpret_cast<float*>(shared_memory() + Tile::acc_offset(warp, row, d * 2 + lane % 4 / 2));
      to[lane % 2 * 2] = acc[d][r * 2], to[lane % 2 * 2 + 1] = acc[d][r * 2 + 1];
    }
  }
  if (FAULT != 69) block_barrier();

  const auto finish = [&](int row, int chunk, Columns8 x, float m, float l) {
    const int h = hk * (H / Hk) + (row0 + row) / Nq, i = (row0 + row) % Nq;
    const float sink = p.extras.sinks.data ? *at<float>(p.extras.sinks, h) : -kInf;
    const auto [inverse, lse] = row_end(m, l, sink, c, scale);
    if (p.lse.data && chunk == 0) *at<float>(p.lse, b, h, i) = lse;
    if (chunk * 8 >= Dv) return;
    T* o = at<T>(p.o, b, h, i, chunk * 8);
    if (a.aligned_o) {
      uint32_t w[4];
#pragma unroll
      for (int e = 0; e < 4; e++) w[e] = pack<T>(x.x[2 * e] * inverse, x.x[2 * e + 1] * inverse);
      store_128(o, {w[0], w[1], w[2], w[3]});
    } else {
      for (int e = 0; e < 8 && chunk * 8 + e < Dv; e++) o[e] = from_float<T>(x.x[e] * inverse);
    }
  };
  const auto each = [&](auto&& f) {  // row of the tile and 8 of its columns
    for (int index = thread_index(); index < kRows * kChunks; index += Tile::kThreads) {
      const int row = index / kChunks, chunk = index % kChunks;
      if (row0 + row < rows && (chunk * 8 < Dv || chunk == 0)) f(row, chunk);
    }
  };
  const int64_t all_rows = static_cast<int64_t>(p.q.size[0]) * H * Nq;
  const auto at_part = [&](int k, int row) {
    return k * all_rows + (static_cast<int64_t>(b) * Hk + hk) * rows + row0 + row;
  };
  each([&](int row, int chunk) {
    float m, l;
    const Columns8 x = merged(
        Tile::kWarps, c,
        [&](int k, float& m, float& l) {
          m = warp_sums[(k * kRows + row) * 2], l = warp_sums[(k * kRows + row) * 2 + 1];
        },
        [&](int k) {
          Columns8 x;
          x.load(shared_memory() + Tile::acc_offset(k, row, chunk * 2),
                 shared_memory() + Tile::acc_offset(k, row, chunk * 2 + 1));
          return x;
        },
        m, l);
    if (used == 1) return finish(row, chunk, x, m, l);
    float* to = at<float>(a.parts, 0) + at_part(split, row) * a.parts.size[2] + chunk * 8;
    const uint32_t* w = reinterpret_cast<const uint32_t*>(x.x);
    store_128(to, {w[0], w[1], w[2], w[3]});
    store_128(to + 4, {w[4], w[5], w[6], w[7]});
    float* const sums = at<float>(a.sums, 0) + at_part(split, row) * 2;
    if (chunk == 0) sums[0] = m, sums[1] = l;
  });
  if (used == 1) return;

  // Thread 0 counts the block in: the barrier and its fence put the results of all threads before the count, and what
  // the others wrote before theirs is seen after it.
  int* const finished = reinterpret_cast<int*>(shared_memory() + Tile::kSums + Tile::kWarps * kRows * 8);
  int* const counter = at<int>(a.counters, head * a.tiles + tile);
  if (FAULT != 63) block_barrier();
  if (thread_index() == 0) {
    if (FAULT != 62) memory_fence();
    *finished = atomic_add(counter, 1) + 1;
    if (FAULT != 73) memory_fence();
  }
  block_barrier();
  if (*finished != used) return;
  if (thread_index() == 0 && FAULT != 65) atomic_add(counter, -used);
  const auto in_order = [&](int k) { return FAULT == 64 ? (split + k) % used : k; };
  each([&](int row, int chunk) {
    float m, l;
    const Columns8 x = merged(
        used, c,
        [&](int k, float& m, float& l) {
          const float* sums = at<const float>(a.sums, 0) + at_part(in_order(k), row) * 2;
          m = sums[0], l = sums[1];
        },
        [&](int k) {
          const float* from = at<const float>(a.parts, 0) + at_part(in_order(k), row) * a.parts.size[2] + chunk * 8;
          Columns8 x;
          x.load(reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(from + 4));
          return x;
        },
        m, l);
    finish(row, chunk, x, m, l);
  });
}

}  // namespace llmfast::cuda
