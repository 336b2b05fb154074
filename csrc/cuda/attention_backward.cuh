// Attention backward for float16 and bfloat16 on tensor cores (mma.sync, sm_80 on), without atomics: every sum has one
// order.
//
// p = exp(scale q k^T - lse), dp = do v^T, ds = p (dp - delta), delta = rowsum(o do) - dlse; dv = p^T do,
// dk = scale ds^T q, dq = scale ds k. attention_bwd_dkdv: a block is BLOCK_N keys of one key head and goes over the
// query heads of its group and their queries, with s and dp transposed, so that p^T and ds^T stay in registers.
// attention_bwd_dq: a block is BLOCK_M queries and goes over the keys. Both pass the tiles they go over through a ring
// of slots as attention_fwd does, one barrier a tile.
#pragma once
#include "attention_forward.cuh"

namespace llmfast::cuda {

// The problem as the kernels take it: mask and bias with 4 dimensions.
struct AttentionBackwardArgs {
  AttentionBackward p;
  int blocks;    // key or query blocks of one head, of all sequences together where they are packed
  bool aligned;  // 16-byte stores reach every row of dq, dk and dv
};

enum Part { kBoth, kKeys, kValues };  // what one pass of attention_bwd_dkdv computes

// 16 rows a warp. At 128 the accumulators of dk and dv are 128 registers, s and dp of 32 queries 32 more; at 256 one of
// them alone is 128, so dk and dv take a pass each. There 64 rows of k and v leave 32 KiB of sm_120's 99 for the ring.
template <int kHeadDim>
struct BackwardTile {
  using Rows = Tile<kHeadDim, false>;                             // layout of a row in shared memory
  static constexpr int kThreads = 128, kOwn = 64;                 // rows of the block's own tiles
  static constexpr int kPassing = kHeadDim <= 64 ? 64 : 32;       // rows of a tile of queries that passes in dkdv
  static constexpr int kPassingKeys = kHeadDim <= 128 ? 64 : 32;  // rows of a tile of keys that passes in dq
  static constexpr int kOwnBytes = kOwn * kHeadDim * 2, kTileBytes = kPassing * kHeadDim * 2;
  static constexpr int kSlotBytes = kTileBytes + kPassing * 8;  // with lse and delta of the queries
  static constexpr int kKeyBytes = kPassingKeys * kHeadDim * 2;
  static constexpr int kRing = kHeadDim <= 128 ? 4 : 2, kKeyRing = kHeadDim <= 128 ? 3 : 2;
  static constexpr int kDkdvBytes = 2 * kOwnBytes + kRing * kSlotBytes, kDqBytes = 2 * kOwnBytes + kKeyRing * kKeyBytes;
  static_assert(kDkdvBytes <= 101376 && kDqBytes <= 101376, "99 KiB of sm_120");
};

// s (16, 8 kN) += a b^T; addresses of this lane's first rows of a and b.
template <class T, int kHeadDim, int kN>
__device__ __forceinline__ void add_rows(float (&s)[kN][4], uint32_t a, uint32_t b) {
  using Rows = Tile<kHeadDim, false>;
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; d++) {
    uint32_t a_part[4];
    ldmatrix_x4(a_part, Rows::advance(a, d));
#pragma unroll
    for (int n = 0; n < kN / 2; n++) {
      uint32_t b_part[4];
      ldmatrix_x4(b_part, Rows::advance(b, d) + n * 16 * Rows::kChunks * 16);
      mma_m16n8k16<T>(s[2 * n], a_part, b_part[0], b_part[1]);
      mma_m16n8k16<T>(s[2 * n + 1], a_part, b_part[2], b_part[3]);
    }
  }
}

// acc (16, kHeadDim) += a b, a (16, 16 kN) in registers.
template <class T, int kHeadDim, int kN>
__device__ __forceinline__ void add_columns(float (&acc)[kHeadDim / 8][4], const uint32_t (&a)[kN][4], uint32_t b) {
  using Rows = Tile<kHeadDim, false>;
#pragma unroll
  for (int n = 0; n < kN; n++)
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; d++) {
      uint32_t b_part[4];
      ldmatrix_x4_trans(b_part, Rows::advance(b, d) + n * 16 * Rows::kChunks * 16);
      mma_m16n8k16<T>(acc[2 * d], a[n], b_part[0], b_part[1]);
      mma_m16n8k16<T>(acc[2 * d + 1], a[n], b_part[2], b_part[3]);
    }
}

// Writes factor * acc to `rows` rows of `to` through the warp's own 16 rows of a tile in shared memory.
template <class T, int kHeadDim>
__device__ __forceinline__ void store_rows(const float (&acc)[kHeadDim / 8][4], float factor, char* tile, int warp_row,
                                           T* to, int64_t stride, int rows, int D, bool aligned) {
  using Rows = Tile<kHeadDim, false>;
  const int lane = thread_index() % 32;
  warp_barrier();
#pragma unroll
  for (int d = 0; d < kHeadDim / 8; d++)
#pragma unroll
    for (int r = 0; r < 2; r++)
      *reinterpret_cast<uint32_t*>(tile + Rows::offset(warp_row + r * 8 + lane / 4, d) + lane % 4 * 4) =
          pack<T>(acc[d][r * 2] * factor, acc[d][r * 2 + 1] * factor);
  if (FAULT != 36) warp_barrier();
#pragma unroll 4
  for (int index = lane; index < 16 * Rows::kChunks; index += 32) {
    const int row = warp_row + index / Rows::kChunks, chunk = index % Rows::kChunks;
    if (row >= rows + (FAULT == 37) || chunk * 8 >= D) continue;
    const char* from = tile + Rows::offset(row, chunk);
    T* out = to + row * stride + chunk * 8;
    if (aligned) {
      store_128(out, load_128(from));
    } else {
      for (int e = 0; e < 8 && chunk * 8 + e < D; e++) out[e] = reinterpret_cast<const T*>(from)[e];
    }
  }
}

// Query i sees keys [i + low, i + high).
struct Band {
  int low, high;
};
__device__ __forceinline__ Band band_of(const AttentionSpec& spec, const Span& x) {
  constexpr int64_t kFar = 1 << 30;
  return {static_cast<int>(max(-kFar, min(kFar, x.Nk - x.Nq - spec.left))),
          static_cast<int>(max(-kFar, min(kFar, x.Nk - x.Nq + spec.right + 1)))};
}

template <class T, int kHeadDim, Part kPart, bool kGeneral>
__global__ void __launch_bounds__(128) attention_bwd_dkdv(const __grid_constant__ AttentionBackwardArgs a) {
  using B = BackwardTile<kHeadDim>;
  note_shared<B::kDkdvBytes>();
  using Rows = typename B::Rows;
  constexpr int BLOCK_N = B::kOwn, BLOCK_M = B::kPassing, kRing = B::kRing;
  constexpr int kKeep = kPart == kBoth ? 2 : 1;  // tiles in use at once: q and do, or one after the other
  static_assert(kRing > kKeep, "a slot to load into");
  const AttentionBackward& p = a.p;
  Span x = span_of<BLOCK_N, true>(p.q, p.k, p.extras, a.blocks);
  const int n0 = x.m0;
  if (n0 >= x.Nk) return;
  const int hk = x.h, group = p.q.size[1] / p.k.size[1];
  const int lane = thread_index() % 32, warp_row = thread_index() / 32 * 16;
  const int D = p.q.size[3], Dv = p.v.size[3];
  const int64_t batch = p.extras.cu_seqlens_q.data ? 0 : x.b;
  const uint32_t base = shared_address(shared_memory()), k_tile = base, v_tile = base + B::kOwnBytes,
                 ring = base + 2 * B::kOwnBytes;
  const int a_lane = Rows::offset(warp_row + lane % 16, lane / 16);
  const int b_lane = Rows::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2), t_lane = Rows::offset(lane % 16, lane / 16);

  const Band band = band_of(p.spec, x);
  const auto clamped = [&](int i) { return max(0, min(i, x.Nq)); };
  const int last = min(n0 + BLOCK_N, x.Nk) - 1;
  const int begin = clamped(n0 - band.high + 1) / BLOCK_M * BLOCK_M, end = clamped(last - band.low + 1);
  const int all_from = clamped(last - band.high + 1),
            all_to = clamped(n0 - band.low + 1);  // queries that see every key
  const int per_head = end > begin ? (end - begin + BLOCK_M - 1) / BLOCK_M : 0, tiles = 2 * group * per_head;

  // Tile 2 s and 2 s + 1 are q and do of step s, do first for dk alone; lse and delta come with q.
  const auto load = [&](int tile, int slot) {
    if (tile < tiles) {
      const int step = tile / 2, h = hk * group + step / per_head, m0 = begin + step % per_head * BLOCK_M;
      const uint32_t to = ring + slot * B::kSlotBytes;
      if ((tile % 2 == 0) == (kPart != kKeys)) {
        Rows::template load<BLOCK_M>(to, at<const T>(p.q, batch, h, x.q0), p.q.stride[2], m0, x.Nq, D);
        if (thread_index() < BLOCK_M) {
          const bool inside = m0 + thread_index() < x.Nq;
          const int64_t row = x.q0 + m0 + thread_index();
          const float lse = inside ? *at<float>(p.lse, batch, h, row) * kLog2e : 0.f;
          float* numbers = reinterpret_cast<float*>(shared_memory() + (to - base) + B::kTileBytes);
          numbers[thread_index()] = lse == -kInf ? 0.f : lse;
          numbers[BLOCK_M + thread_index()] = inside ? *at<float>(p.delta, batch, h, row) : 0.f;
        }
      } else {
        Rows::template load<BLOCK_M>(to, at<const T>(p.dout, batch, h, x.q0), p.dout.stride[2], m0, x.Nq, Dv);
      }
    }
    cp_async_commit();
  };
  if (tiles) {
    Rows::template load<BLOCK_N>(k_tile, at<const T>(p.k, batch, hk, x.k0), p.k.stride[2], n0, x.Nk, D);
    if (kPart != kValues)
      Rows::template load<BLOCK_N>(v_tile, at<const T>(p.v, batch, hk, x.k0), p.v.stride[2], n0, x.Nk, Dv);
  }
#pragma unroll
  for (int tile = 0; tile < kRing - kKeep; tile++) load(tile, tile);

  float dk[kPart == kValues ? 1 : kHeadDim / 8][4] = {}, dv[kPart == kKeys ? 1 : kHeadDim / 8][4] = {};
  const float scale = p.spec.scale, c = scale * kLog2e;
  int slot = 0;
  const auto next = [&](int tile) {
    FAULT == 31 ? cp_async_wait<kRing - kKeep>() : cp_async_wait<kRing - kKeep - 1>();
    if (FAULT != 32) block_barrier();
    const uint32_t address = ring + slot * B::kSlotBytes;
    load(tile + kRing - kKeep, FAULT == 33 ? slot : slot < kKeep ? slot + kRing - kKeep : slot - kKeep);
    slot = slot == kRing - 1 ? 0 : slot + 1;
    return address;
  };
  uint32_t probabilities[BLOCK_M / 16][4], gradients[BLOCK_M / 16][4];  // p^T and ds^T
  for (int tile = 0; tile < tiles; tile += 2) {
    const int step = tile / 2, m0 = begin + step % per_head * BLOCK_M;
    x.h = hk * group + step / per_head;
    float s[BLOCK_M / 8][4] = {}, dp[BLOCK_M / 8][4] = {};  // (BLOCK_N, BLOCK_M)
    const auto soften = [&](uint32_t q_tile) {
      const float* numbers = reinterpret_cast<const float*>(shared_memory() + (q_tile - base) + B::kTileBytes);
      const bool edge = m0 < all_from || m0 + BLOCK_M > all_to;
      const auto slope = [&] { return slope_of(p.extras.alibi_slopes, x.b, x.h); };
#pragma unroll
      for (int n = 0; n < BLOCK_M / 8; n++) {
        const int column = n * 8 + lane % 4 * 2;
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int i = m0 + column + e, j = n0 + warp_row + lane / 4 + r * 8;
            float y = s[n][r * 2 + e] * (kGeneral ? 1.f : c), derivative = 1.f;
            if constexpr (kGeneral) {
              if (i < x.Nq && j < x.Nk)
                y = score_of(y, p.spec, p.extras, x.b, x.h, i, j, slope, i + x.Nk - x.Nq - j, derivative) * kLog2e;
            }
            if (edge && (j < i + band.low || (FAULT == 34 ? j > i + band.high : j >= i + band.high))) y = -kInf;
            const float probability = exp2_approx(y - numbers[column + e]);
            s[n][r * 2 + e] = probability;
            if (kPart != kValues)
              dp[n][r * 2 + e] = probability * (dp[n][r * 2 + e] - numbers[BLOCK_M + column + e]) * derivative;
          }
          probabilities[n / 2][n % 2 * 2 + r] = pack<T>(s[n][r * 2], s[n][r * 2 + 1]);
          if (kPart != kValues) gradients[n / 2][n % 2 * 2 + r] = pack<T>(dp[n][r * 2], dp[n][r * 2 + 1]);
        }
      }
    };
    const uint32_t first = next(tile);
    if constexpr (kPart == kKeys) {
      add_rows<T, kHeadDim>(dp, v_tile + a_lane, first + b_lane);
      const uint32_t q_tile = next(tile + 1);
      add_rows<T, kHeadDim>(s, k_tile + a_lane, q_tile + b_lane);
      soften(q_tile);
      add_columns<T, kHeadDim>(dk, gradients, q_tile + t_lane);
    } else {
      add_rows<T, kHeadDim>(s, k_tile + a_lane, first + b_lane);
      if constexpr (kPart == kValues) soften(first);
      const uint32_t do_tile = next(tile + 1);
      if constexpr (kPart == kBoth) {
        add_rows<T, kHeadDim>(dp, v_tile + a_lane, do_tile + b_lane);
        soften(first);
      }
      add_columns<T, kHeadDim>(dv, probabilities, do_tile + t_lane);
      if constexpr (kPart == kBoth) add_columns<T, kHeadDim>(dk, gradients, first + t_lane);
    }
  }
  const int rows = x.Nk - n0;
  if constexpr (kPart != kValues)
    store_rows<T, kHeadDim>(dk, scale, shared_memory(), warp_row, at<T>(p.dk, batch, hk, x.k0 + n0), p.dk.stride[2],
                            rows, D, a.aligned);
  if constexpr (kPart != kKeys)
    store_rows<T, kHeadDim>(dv, 1.f, shared_memory(), warp_row, at<T>(p.dv, batch, hk, x.k0 + n0), p.dv.stride[2], rows,
                            Dv, a.aligned);
}

template <class T, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(128) attention_bwd_dq(const __grid_constant__ AttentionBackwardArgs a) {
  using B = BackwardTile<kHeadDim>;
  note_shared<B::kDqBytes>();
  using Rows = typename B::Rows;
  constexpr int BLOCK_M = B::kOwn, BLOCK_N = B::kPassingKeys, kRing = B::kKeyRing;
  const AttentionBackward& p = a.p;
  const Span x = span_of<BLOCK_M, false>(p.q, p.k, p.extras, a.blocks);
  if (x.m0 >= x.Nq) return;
  const int lane = thread_index() % 32, warp_row = thread_index() / 32 * 16;
  const int D = p.q.size[3], Dv = p.v.size[3], hk = x.h / (p.q.size[1] / p.k.size[1] + (p.k.size[1] == 0));
  const int64_t batch = p.extras.cu_seqlens_q.data ? 0 : x.b;
  const T* k = at<const T>(p.k, batch, hk, x.k0);
  const T* v = at<const T>(p.v, batch, hk, x.k0);
  const uint32_t q_tile = shared_address(shared_memory()), do_tile = q_tile + B::kOwnBytes,
                 ring = q_tile + 2 * B::kOwnBytes;
  const int a_lane = Rows::offset(warp_row + lane % 16, lane / 16);
  const int b_lane = Rows::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2), t_lane = Rows::offset(lane % 16, lane / 16);

  const Band band = band_of(p.spec, x);
  const auto clamped = [&](int j) { return max(0, min(j, x.Nk)); };
  const int last = min(x.m0 + BLOCK_M, x.Nq) - 1;
  const int begin = clamped(x.m0 + band.low) / BLOCK_N * BLOCK_N, end = clamped(last + band.high);
  const int all_from = clamped(last + band.low), all_to = clamped(x.m0 + band.high);  // keys that every row sees
  const int tiles = end > begin ? 2 * ((end - begin + BLOCK_N - 1) / BLOCK_N) : 0;

  const auto load = [&](int tile, int slot) {  // v0 k0 v1 k1 ...
    if (tile < tiles) {
      const int n0 = begin + tile / 2 * BLOCK_N;
      const uint32_t to = ring + slot * B::kKeyBytes;
      if (tile % 2 == 0)
        Rows::template load<BLOCK_N>(to, v, p.v.stride[2], n0, x.Nk, Dv);
      else
        Rows::template load<BLOCK_N>(to, k, p.k.stride[2], n0, x.Nk, D);
    }
    cp_async_commit();
  };
  if (tiles) {
    Rows::template load<BLOCK_M>(q_tile, at<const T>(p.q, batch, x.h, x.q0), p.q.stride[2], x.m0, x.Nq, D);
    Rows::template load<BLOCK_M>(do_tile, at<const T>(p.dout, batch, x.h, x.q0), p.dout.stride[2], x.m0, x.Nq, Dv);
  }
#pragma unroll
  for (int tile = 0; tile < kRing - 1; tile++) load(tile, tile);

  float lse[2] = {}, delta[2] = {};  // of rows lane / 4 and lane / 4 + 8
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = x.m0 + warp_row + lane / 4 + r * 8;
    if (row >= x.Nq) continue;
    lse[r] = *at<float>(p.lse, batch, x.h, x.q0 + row) * kLog2e;
    if (lse[r] == -kInf) lse[r] = 0.f;
    delta[r] = *at<float>(p.delta, batch, x.h, x.q0 + row);
  }
  float dq[kHeadDim / 8][4] = {};
  const float scale = p.spec.scale, c = scale * kLog2e;
  const auto slope = [&] { return slope_of(p.extras.alibi_slopes, x.b, x.h); };
  int slot = 0;
  const auto next = [&](int tile) {
    FAULT == 41 ? cp_async_wait<kRing - 1>() : cp_async_wait<kRing - 2>();
    if (FAULT != 42) block_barrier();
    const uint32_t address = ring + slot * B::kKeyBytes;
    load(tile + kRing - 1, FAULT == 43 ? slot : slot == 0 ? kRing - 1 : slot - 1);
    slot = slot == kRing - 1 ? 0 : slot + 1;
    return address;
  };
  for (int tile = 0; tile < tiles; tile += 2) {
    const int n0 = begin + tile / 2 * BLOCK_N;
    float s[BLOCK_N / 8][4] = {}, dp[BLOCK_N / 8][4] = {};  // (BLOCK_M, BLOCK_N)
    add_rows<T, kHeadDim>(dp, do_tile + a_lane, next(tile) + b_lane);
    const uint32_t k_tile = next(tile + 1);
    add_rows<T, kHeadDim>(s, q_tile + a_lane, k_tile + b_lane);
    const bool edge = n0 < all_from || n0 + BLOCK_N > all_to;
    uint32_t gradients[BLOCK_N / 16][4];
#pragma unroll
    for (int n = 0; n < BLOCK_N / 8; n++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int i = x.m0 + warp_row + lane / 4 + r * 8, j = n0 + n * 8 + lane % 4 * 2 + e;
          float y = s[n][r * 2 + e] * (kGeneral ? 1.f : c), derivative = 1.f;
          if constexpr (kGeneral) {
            if (i < x.Nq && j < x.Nk)
              y = score_of(y, p.spec, p.extras, x.b, x.h, i, j, slope, i + x.Nk - x.Nq - j, derivative) * kLog2e;
          }
          if (edge && (j < i + band.low || (FAULT == 44 ? j > i + band.high : j >= i + band.high) || j >= x.Nk))
            y = -kInf;
          dp[n][r * 2 + e] = exp2_approx(y - lse[r]) * (dp[n][r * 2 + e] - delta[r]) * derivative;
        }
        gradients[n / 2][n % 2 * 2 + r] = pack<T>(dp[n][r * 2], dp[n][r * 2 + 1]);
      }
    add_columns<T, kHeadDim>(dq, gradients, k_tile + t_lane);
  }
  store_rows<T, kHeadDim>(dq, scale, shared_memory(), warp_row, at<T>(p.dq, batch, x.h, x.q0 + x.m0), p.dq.stride[2],
                          x.Nq - x.m0, D, a.aligned);
}

template <class T, int kHeadDim, bool kGeneral>
const char* run_backward(const AttentionBackward& problem, void* stream) {
  using B = BackwardTile<kHeadDim>;
  AttentionBackwardArgs a{problem, 0, false};
  const AttentionBackward& p = a.p;
  a.p.extras.mask = four_dimensional(p.extras.mask), a.p.extras.bias = four_dimensional(p.extras.bias);
  a.aligned = p.q.size[3] % 8 == 0 && p.v.size[3] % 8 == 0 && has_aligned_rows(p.dq, sizeof(T)) &&
              has_aligned_rows(p.dk, sizeof(T)) && has_aligned_rows(p.dv, sizeof(T));
  const int64_t sequences = p.extras.cu_seqlens_q ? p.extras.cu_seqlens_q.size[0] - 1 : 0;
  const auto blocks = [&](int64_t rows) {
    return sequences ? rows / B::kOwn + sequences : (rows + B::kOwn - 1) / B::kOwn;
  };
  const auto start = [&](void (*kernel)(AttentionBackwardArgs), const Tensor& own, int bytes) {
    a.blocks = blocks(own.size[2]);
    return launch(kernel, own.size[0] * own.size[1] * a.blocks, B::kThreads, bytes, stream, a);
  };
  const char* error = start(attention_bwd_dq<T, kHeadDim, kGeneral>, p.q, B::kDqBytes);
  if constexpr (kHeadDim <= 128) {
    if (!error) error = start(attention_bwd_dkdv<T, kHeadDim, kBoth, kGeneral>, p.k, B::kDkdvBytes);
  } else {
    if (!error) error = start(attention_bwd_dkdv<T, kHeadDim, kKeys, kGeneral>, p.k, B::kDkdvBytes);
    if (!error) error = start(attention_bwd_dkdv<T, kHeadDim, kValues, kGeneral>, p.k, B::kDkdvBytes);
  }
  return error;
}

// Head dims 64, 128 and 256: fewer kernels to compile; smaller ones are padded with zeros in shared memory only.
template <class T>
const char* dispatch_backward(const AttentionBackward& p, void* stream) {
  return with_head_dim<64, 128, 256>(p.q, p.v, [&](auto n) {
    constexpr int kHeadDim = decltype(n)::value;
    return is_general(p.spec, p.extras) ? run_backward<T, kHeadDim, true>(p, stream)
                                        : run_backward<T, kHeadDim, false>(p, stream);
  });
}

const char* attention_backward_fp16(const AttentionBackward& problem, void* stream);

}  // namespace llmfast::cuda
