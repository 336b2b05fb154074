// Chooses the decode kernel and starts it.
#include "attention_decode.cuh"

#include "launch.h"

namespace llmfast::cuda {
namespace {

template <class T, int kHeadDim>
const char* run(const AttentionDecode& problem, void* stream) {
  using Tile = DecodeTile<kHeadDim>;
  AttentionDecodeArgs a{problem.forward, problem.parts, problem.sums, problem.counters, 0, 1, false, false};
  const AttentionForward& p = a.p;
  a.p.extras.mask = four_dimensional(p.extras.mask), a.p.extras.bias = four_dimensional(p.extras.bias);
  a.aligned_o = has_aligned_rows(p.o, sizeof(T)) && p.o.size[3] % 8 == 0;
  a.general = is_general(p.spec, p.extras);
  const int64_t B = p.q.size[0], H = p.q.size[1], Hk = p.k.size[1], Nq = p.q.size[2];
  if (B * H * Nq == 0) return nullptr;
  a.tiles = (H / Hk * Nq + Tile::kRows - 1) / Tile::kRows;
  if (a.parts) a.splits = a.parts.size[0];
  return launch(attention_decode<T, kHeadDim>, B * Hk * a.splits * a.tiles, Tile::kThreads, Tile::kSharedBytes, stream,
                a);
}

template <class T>
const char* dispatch_head_dim(const AttentionDecode& p, void* stream) {
  return with_head_dim<32, 64, 96, 128, 192, 256>(p.forward.q, p.forward.v,
                                                  [&](auto n) { return run<T, decltype(n)::value>(p, stream); });
}

}  // namespace

const char* attention_decode(const AttentionDecode& problem, void* stream) {
  switch (problem.forward.q.dtype) {
    case Dtype::kFloat16:
      return dispatch_head_dim<half>(problem, stream);
    case Dtype::kBFloat16:
      return dispatch_head_dim<bf16>(problem, stream);
    default:
      return "attention takes float16 or bfloat16";
  }
}

}  // namespace llmfast::cuda
