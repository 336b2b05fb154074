// Chooses the attention forward kernel of one dtype and starts it.
#pragma once
#include "attention_forward.cuh"

namespace llmfast::cuda {

template <class T, int kHeadDim, bool kGeneral>
const char* run(const AttentionForward& problem, void* stream) {
  using Tile = cuda::Tile<kHeadDim, kGeneral>;
  AttentionForwardArgs a{problem, 0, false};
  const AttentionForward& p = a.p;
  a.p.extras.mask = four_dimensional(p.extras.mask), a.p.extras.bias = four_dimensional(p.extras.bias);
  a.aligned_o = has_aligned_rows(p.o, sizeof(T)) && p.o.size[3] % 8 == 0;
  const int64_t sequences = p.extras.cu_seqlens_q ? p.extras.cu_seqlens_q.size[0] - 1 : 0, Nq = p.q.size[2];
  // Packed: a sequence fills its last block in part, so no more than this many for each head.
  a.blocks = p.extras.cu_seqlens_q ? Nq / Tile::BLOCK_M + sequences : (Nq + Tile::BLOCK_M - 1) / Tile::BLOCK_M;
  return launch(attention_fwd<T, kHeadDim, kGeneral>, p.q.size[0] * p.q.size[1] * a.blocks, Tile::kThreads,
                Tile::kSharedBytes, stream, a);
}

template <class T>
const char* dispatch_head_dim(const AttentionForward& p, void* stream) {
  return with_head_dim<32, 64, 96, 128, 192, 256>(p.q, p.v, [&](auto n) {
    constexpr int kHeadDim = decltype(n)::value;
    return is_general(p.spec, p.extras) ? run<T, kHeadDim, true>(p, stream) : run<T, kHeadDim, false>(p, stream);
  });
}

const char* attention_forward_fp16(const AttentionForward& problem, void* stream);
const char* attention_forward_bf16(const AttentionForward& problem, void* stream);

}  // namespace llmfast::cuda
