// Attention forward for float16 and bfloat16 on tensor cores (mma.sync, sm_80 on): o = softmax(scale q k^T) v, flash
// form.
//
// One block is BLOCK_M queries of one (sequence, head); its warps share each tile of BLOCK_N keys. q stays in shared
// memory; k and v tiles pass through a ring of kRing slots filled by cp.async, in the order k0 v0 k1 v1 ...: while one
// is used the next kRing - 1 are on their way, and one barrier a tile both publishes a tile and frees the slot before
// it. p never leaves registers. Tiles outside the band are not visited; only tiles on its edge, or past the last key,
// are masked. Rows of shared memory are kHeadDim elements; 16-byte chunks are XOR-swizzled so that the 8 rows of an
// ldmatrix lie in 8 different bank groups.
#pragma once
#include "views.cuh"

namespace llmfast::cuda {

// The problem as the kernel takes it: mask and bias with 4 dimensions.
struct AttentionForwardArgs {
  AttentionForward p;
  int blocks;      // query blocks of one head, of all sequences together where they are packed
  bool aligned_o;  // 16-byte stores reach every row of o
};

// kMma = 2: 4 warps of 32 rows, each fragment of k and v read from shared memory serves two mma; at 128 acc is 128
// registers, s 64, and nothing is left for `adjust`, so the general kernel takes 16 rows a warp from there on. Beyond
// 128 so do all, with 32 keys: acc is 128 registers, s 16, and shared memory stays under the 99 KiB of sm_120.
template <int kHeadDim, bool kGeneral>
struct Tile {
  static_assert(kHeadDim % 32 == 0 && kHeadDim <= 256, "a row is a multiple of 64 bytes, and acc fits the registers");
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kMma = kHeadDim <= (kGeneral ? 96 : 128) ? 2 : 1;  // mma row tiles of a warp
  static constexpr int BLOCK_M = 16 * kMma * kWarps, BLOCK_N = kHeadDim <= 128 ? 64 : 32, kRing = 3;
  static constexpr int kChunks = kHeadDim / 8;  // of 16 bytes in a row
  static constexpr int kKeyBytes = BLOCK_N * kHeadDim * 2, kQueryBytes = BLOCK_M * kHeadDim * 2;
  static constexpr int kSharedBytes = kQueryBytes + kRing * kKeyBytes;  // 128: 80 KiB, two blocks on sm_80; 256: 80 KiB

  // Byte offset of a chunk of a row.
  __device__ __forceinline__ static int offset(int row, int chunk) {
    return (row * kChunks + (chunk ^ (kHeadDim % 64 == 0 ? row & 7 : row >> 1 & 3))) * 16;
  }

  // The address of chunk c + 2 d of a row from that of chunk c = 0 or 1: one xor, so that no table of addresses fills
  // registers.
  __device__ __forceinline__ static uint32_t advance(uint32_t address, int d) {
    return kHeadDim % 64 == 0 ? (address ^ (d & 3) << 5) + (d >> 2) * 128 : (address ^ (d & 1) << 5) + (d >> 1) * 64;
  }

  // Starts copying rows [first, first + kRows) of a matrix with `rows` rows of D elements; what lies outside becomes
  // zero.
  template <int kRows, class T>
  __device__ __forceinline__ static void load(uint32_t shared, const T* x, int64_t stride, int first, int rows, int D) {
#pragma unroll 4
    for (int i = 0; i < kRows * kChunks / kThreads; i++) {
      const int index = i * kThreads + thread_index(), row = index / kChunks, chunk = index % kChunks;
      const int left = (D - chunk * 8) * 2, inside = first + row < rows + (FAULT == 7) && left > 0;
      const int bytes = inside ? left < 16 ? left : 16 : 0;
      cp_async_16(shared + offset(row, chunk), inside ? x + (first + row) * stride + chunk * 8 : x, bytes);
    }
  }
};

// The queries of a block: rows [m0, m0 + BLOCK_M) of sequence b, head h, which has Nq queries from q0 and Nk keys from
// k0.
struct Span {
  int b, h, m0, q0, Nq, k0, Nk;
};

// [start, length) of sequence b of a packed tensor with `total` rows, whatever cu_seqlens holds.
__device__ __forceinline__ void sequence(const Tensor& cu_seqlens, int b, int total, int& start, int& length) {
  const int* cu = reinterpret_cast<const int*>(cu_seqlens.data);
  const int64_t stride = cu_seqlens.stride[0];
  start = min(max(cu[b * stride], 0), total);
  length = max(min(max(cu[(b + 1) * stride], 0), total) - start, 0);
}

// The span of this block; m0 past the last row where there is none. Blocks go over queries, the last first: under a
// causal band they have most keys. kOfKeys: over the keys of a key head h, the first first.
template <int kBlock, bool kOfKeys>
__device__ __forceinline__ Span span_of(const Tensor& q, const Tensor& k, const Extras& extras, int blocks) {
  const int H = kOfKeys ? k.size[1] : q.size[1], block = block_index() % blocks;
  const int64_t head = block_index() / blocks;
  Span x{static_cast<int>(head / H), static_cast<int>(head % H), 0, 0, static_cast<int>(q.size[2]), 0,
         static_cast<int>(k.size[2])};
  if (!extras.cu_seqlens_q.data) {
    x.m0 = (kOfKeys ? block : blocks - 1 - block) * kBlock;
    return x;
  }
  const Tensor& cu_seqlens = kOfKeys ? extras.cu_seqlens_k : extras.cu_seqlens_q;
  const int B = cu_seqlens.size[0] - 1, lane = thread_index() % 32, queries = x.Nq, keys = x.Nk;
  x.h = head;
  for (int first = 0, passed = 0; first < B;
       first += 32) {  // 32 sequences at a time: how many blocks end at or before each
    int start, length, mine = 0;
    if (first + lane < B) {
      sequence(cu_seqlens, first + lane, kOfKeys ? keys : queries, start, length);
      mine = (length + kBlock - 1) / kBlock;
    }
    int ended = mine;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int before = shuffle_up(ended, lanes);
      if (lane >= lanes) ended += before;
    }
    const uint32_t beyond = ballot(block < passed + ended);
    if (beyond) {
      int found = 0;
      while (!(beyond >> found & 1)) found++;
      x.b = first + found;
      sequence(extras.cu_seqlens_q, x.b, queries, x.q0, x.Nq);
      sequence(extras.cu_seqlens_k, x.b, keys, x.k0, x.Nk);
      const int end = passed + shuffle(ended, found);  // blocks up to the end of this sequence
      x.m0 = (kOfKeys ? block - end + shuffle(mine, found) : end - 1 - block) * kBlock;
      return x;
    }
    passed += shuffle(ended, 31);
  }
  x.Nq = x.Nk = 0;
  return x;
}

// Scores of one warp tile with every option; i0: row, j0: column of s[0], which step by 8.
template <int kMma, int kN>
__device__ __forceinline__ void adjust(float (&s)[kMma][kN][4], const AttentionForward& p, const Span& x, int i0,
                                       int j0) {
  const float slope = slope_of(p.extras.alibi_slopes, x.b, x.h);
  float derivative;
#pragma unroll
  for (int m = 0; m < kMma; m++)
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = i0 + m * 16 + e / 2 * 8, j = j0 + n * 8 + e % 2;
        if (i < x.Nq && j < x.Nk)
          s[m][n][e] = score_of(
              s[m][n][e], p.spec, p.extras, x.b, x.h, i, j, [=] { return slope; }, i + x.Nk - x.Nq - j, derivative);
      }
}

// What a row's acc is multiplied by, and its lse, from its maximum m (c takes it to base-2 units, scale to natural
// ones) and sum l. A sink is one more key without a value. lse = scale m + log(sum), less what the rounding of m c put
// into every term of the sum.
struct RowEnd {
  float inverse, lse;
};
__device__ __forceinline__ RowEnd row_end(float m, float l, float sink, float c, float scale) {
  const float seen = m * c, absent = sink * kLog2e, top = fmaxf(seen, absent), base = top == -kInf ? 0.f : top;
  const float alpha = exp2_approx(seen - base), sum = l * alpha + exp2_approx(absent - base);
  const float excess = seen < absent ? fmaf(sink, kLog2e, -base) : fmaf(m, c, -base);
  const float lse = fmaf(seen < absent ? sink : m, seen < absent ? 1.f : scale, logf(sum) - excess * kLn2);
  return {sum == 0.f ? 0.f : alpha / sum, sum == 0.f ? -kInf : lse};
}

// kGeneral: an option that `score_of` knows, or a scale that is not positive.
template <class T, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(Tile<kHeadDim, kGeneral>::kThreads)
    attention_fwd(const __grid_constant__ AttentionForwardArgs a) {
  using Tile = cuda::Tile<kHeadDim, kGeneral>;
  note_shared<Tile::kSharedBytes>();
  constexpr int BLOCK_M = Tile::BLOCK_M, BLOCK_N = Tile::BLOCK_N, kRing = Tile::kRing, kMma = Tile::kMma;
  const AttentionForward& p = a.p;
  const Span x = span_of<BLOCK_M, false>(p.q, p.k, p.extras, a.blocks);
  if (x.m0 >= x.Nq) return;
  const int lane = thread_index() % 32, warp_row = thread_index() / 32 * 16 * kMma;
  const int D = p.q.size[3], Dv = p.v.size[3], hk = x.h / (p.q.size[1] / p.k.size[1] + (p.k.size[1] == 0));
  const int64_t batch = p.extras.cu_seqlens_q.data ? 0 : x.b;
  const T* q = at<const T>(p.q, batch, x.h, x.q0);
  const T* k = at<const T>(p.k, batch, hk, x.k0);
  const T* v = at<const T>(p.v, batch, hk, x.k0);
  const uint32_t q_tile = shared_address(shared_memory()), ring = q_tile + Tile::kQueryBytes;
  // Where this lane's addresses for ldmatrix begin: rows of q, of k (8 keys, both halves of 16 dims, 8 more keys), of
  // v.
  const int q_lane = Tile::offset(warp_row + lane % 16, lane / 16);
  const int k_lane = Tile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2), v_lane = Tile::offset(lane % 16, lane / 16);
  constexpr int kRows16 = 16 * Tile::kChunks * 16;  // bytes of 16 rows, after which the swizzle repeats

  // Query i sees keys [i + low, i + high), and of those [0, Nk).
  constexpr int64_t kFar = 1 << 30;  // further than any key: i + low and i + high fit an int
  const int low = max(-kFar, min(kFar, x.Nk - x.Nq - p.spec.left)),
            high = max(-kFar, min(kFar, x.Nk - x.Nq + p.spec.right + 1));
  const auto clamped = [&](int j) { return max(0, min(j, x.Nk)); };
  const int last_row = min(x.m0 + BLOCK_M, x.Nq) - 1;
  const int begin = clamped(x.m0 + low) / BLOCK_N * BLOCK_N, end = clamped(last_row + high);
  const int all_from = clamped(last_row + low), all_to = clamped(x.m0 + high);  // keys that every row of the block sees
  const int tiles = end > begin ? 2 * ((end - begin + BLOCK_N - 1) / BLOCK_N) : 0;  // of k and v

  const auto load = [&](int tile, int slot) {
    if (tile < tiles) {
      const int n0 = begin + tile / 2 * BLOCK_N;
      if (tile % 2 == 0)
        Tile::template load<BLOCK_N>(ring + slot * Tile::kKeyBytes, k, p.k.stride[2], n0, x.Nk, D);
      else
        Tile::template load<BLOCK_N>(ring + slot * Tile::kKeyBytes, v, p.v.stride[2], n0, x.Nk, Dv);
    }
    cp_async_commit();
  };
  if (tiles) Tile::template load<BLOCK_M>(q_tile, q, p.q.stride[2], x.m0, x.Nq, D);
#pragma unroll
  for (int tile = 0; tile < kRing - 1; tile++) load(tile, tile);

  float acc[kMma][kHeadDim / 8][4] =
      {};                             // (BLOCK_M, Dv): rows lane / 4 (+ 8), columns lane % 4 * 2 (+ 1) of each 16 x 8
  float m[kMma][2], l[kMma][2] = {};  // of rows lane / 4 and lane / 4 + 8
  uint32_t probabilities[kMma][BLOCK_N / 16][4];
#pragma unroll
  for (int i = 0; i < kMma; i++) m[i][0] = m[i][1] = -kInf;
  const float scale = kGeneral ? 1.f : static_cast<float>(p.spec.scale);  // what s still lacks; positive
  const float c = scale * kLog2e;                                         // s to base-2 units

  int slot = 0;
  // Waits for the next tile and starts the one that takes the slot of the tile before it; returns the tile's address.
  const auto next = [&](int tile) {
    FAULT == 1 ? cp_async_wait<kRing - 1>() : cp_async_wait<kRing - 2>();
    if (FAULT != 2) block_barrier();
    const uint32_t address = ring + slot * Tile::kKeyBytes;
    load(tile + kRing - 1, FAULT == 3 ? slot : slot == 0 ? kRing - 1 : slot - 1);
    slot = slot == kRing - 1 ? 0 : slot + 1;
    return address;
  };
  for (int tile = 0; tile < tiles; tile += 2) {
    const int n0 = begin + tile / 2 * BLOCK_N;
    const uint32_t k_tile = next(tile);
    float s[kMma][BLOCK_N / 8][4] = {};  // (BLOCK_M, BLOCK_N)
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; d++) {
      uint32_t q_part[kMma][4];
#pragma unroll
      for (int i = 0; i < kMma; i++) ldmatrix_x4(q_part[i], Tile::advance(q_tile + q_lane, d) + i * kRows16);
#pragma unroll
      for (int n = 0; n < BLOCK_N / 16; n++) {
        uint32_t k_part[4];
        ldmatrix_x4(k_part, Tile::advance(k_tile + k_lane, d) + n * kRows16);
#pragma unroll
        for (int i = 0; i < kMma; i++) {
          mma_m16n8k16<T>(s[i][2 * n], q_part[i], k_part[0], k_part[1]);
          mma_m16n8k16<T>(s[i][2 * n + 1], q_part[i], k_part[2], k_part[3]);
        }
      }
    }
    const int row0 = x.m0 + warp_row + lane / 4, column0 = n0 + lane % 4 * 2;
    if constexpr (kGeneral) adjust(s, p, x, row0, column0);
    if (n0 < all_from || n0 + BLOCK_N > all_to) {
#pragma unroll
      for (int i = 0; i < kMma; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int from = clamped(row0 + i * 16 + r * 8 + low), to = clamped(row0 + i * 16 + r * 8 + high);
#pragma unroll
          for (int n = 0; n < BLOCK_N / 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const int j = column0 + n * 8 + e;
              if (j < from || (FAULT == 4 ? j > to : j >= to)) s[i][n][r * 2 + e] = -kInf;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kMma; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float m_new = m[i][r];
#pragma unroll
        for (int n = 0; n < BLOCK_N / 8; n++) m_new = fmaxf(m_new, fmaxf(s[i][n][r * 2], s[i][n][r * 2 + 1]));
        m_new = fmaxf(m_new, shuffle_xor(m_new, 1));
        if (FAULT != 5) m_new = fmaxf(m_new, shuffle_xor(m_new, 2));
        const float m_safe = m_new == -kInf ? 0.f : m_new, base = m_safe * c;
        const float alpha = exp2_approx((m[i][r] - m_safe) * c);  // 1 for a maximum that stays, not 2^(base's rounding)
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < BLOCK_N / 8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) sum += s[i][n][r * 2 + e] = exp2_approx(s[i][n][r * 2 + e] * c - base);
        m[i][r] = m_new;
        l[i][r] = l[i][r] * alpha + sum;
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; d++) acc[i][d][r * 2] *= alpha, acc[i][d][r * 2 + 1] *= alpha;
      }
#pragma unroll
    for (int i = 0; i < kMma; i++)
#pragma unroll
      for (int n = 0; n < BLOCK_N / 8; n++)
#pragma unroll
        for (int r = 0; r < 2; r++)
          probabilities[i][n / 2][n % 2 * 2 + r] = pack<T>(s[i][n][r * 2], s[i][n][r * 2 + 1]);

    const uint32_t v_tile = next(tile + 1);
#pragma unroll
    for (int n = 0; n < BLOCK_N / 16; n++)
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; d++) {
        uint32_t v_part[4];
        ldmatrix_x4_trans(v_part, Tile::advance(v_tile + v_lane, d) + n * kRows16);
#pragma unroll
        for (int i = 0; i < kMma; i++) {
          mma_m16n8k16<T>(acc[i][2 * d], probabilities[i][n], v_part[0], v_part[1]);
          mma_m16n8k16<T>(acc[i][2 * d + 1], probabilities[i][n], v_part[2], v_part[3]);
        }
      }
  }

  // o leaves through the warp's own rows of q's tile, as whole 16-byte chunks.
  const float sink = p.extras.sinks.data ? *at<float>(p.extras.sinks, x.h) : -kInf;
#pragma unroll
  for (int i = 0; i < kMma; i++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float sum = l[i][r];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const RowEnd end = row_end(m[i][r], sum, sink, c, scale);
      const int row = warp_row + i * 16 + r * 8 + lane / 4;
      if (p.lse.data && lane % 4 == 0 && x.m0 + row < x.Nq) *at<float>(p.lse, batch, x.h, x.q0 + x.m0 + row) = end.lse;
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; d++)
        *reinterpret_cast<uint32_t*>(shared_memory() + Tile::offset(row, d) + lane % 4 * 4) =
            pack<T>(acc[i][d][r * 2] * end.inverse, acc[i][d][r * 2 + 1] * end.inverse);
    }
  if (FAULT != 6) warp_barrier();
  T* o = at<T>(p.o, batch, x.h, x.q0 + x.m0);
#pragma unroll 4
  for (int index = lane; index < 16 * kMma * Tile::kChunks; index += 32) {
    const int row = warp_row + index / Tile::kChunks, chunk = index % Tile::kChunks;
    if (x.m0 + row >= x.Nq + (FAULT == 8) || chunk * 8 >= Dv) continue;
    const char* from = shared_memory() + Tile::offset(row, chunk);
    T* to = o + row * p.o.stride[2] + chunk * 8;
    if (a.aligned_o) {
      store_128(to, load_128(from));
    } else {
      for (int e = 0; e < 8 && chunk * 8 + e < Dv; e++) to[e] = reinterpret_cast<const T*>(from)[e];
    }
  }
}

}  // namespace llmfast::cuda
