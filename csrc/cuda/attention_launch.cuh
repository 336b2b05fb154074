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

template <class T, int kHeadDim>
const char* run(const AttentionForward& p, void* stream) {
  const bool general =
      p.spec.scale <= 0 || p.spec.softcap != 0 || p.extras.mask || p.extras.bias || p.extras.alibi_slopes;
  return general ? run<T, kHeadDim, true>(p, stream) : run<T, kHeadDim, false>(p, stream);
}

template <class T>
const char* dispatch_head_dim(const AttentionForward& p, void* stream) {
  const int64_t D = p.q.size[3] > p.v.size[3] ? p.q.size[3] : p.v.size[3];
  if (D <= 32) return run<T, 32>(p, stream);
  if (D <= 64) return run<T, 64>(p, stream);
  if (D <= 96) return run<T, 96>(p, stream);
  if (D <= 128) return run<T, 128>(p, stream);
  if (D <= 192) return run<T, 192>(p, stream);
  if (D <= 256) return run<T, 256>(p, stream);
  return "attention takes head dims up to 256";
}

const char* attention_forward_fp16(const AttentionForward& problem, void* stream);
const char* attention_forward_bf16(const AttentionForward& problem, void* stream);

}  // namespace llmfast::cuda
