// Starts the rowdot kernel.
#include "attention_rowdot.cuh"

namespace llmfast::cuda {
namespace {

template <class T>
const char* run(const RowDot& p, void* stream) {
  const int64_t Dv = p.o.size[3], rows = p.o.size[0] * p.o.size[1] * p.o.size[2];
  const bool aligned = Dv % kVector<T> == 0 && has_aligned_rows(p.o, sizeof(T)) && has_aligned_rows(p.dout, sizeof(T));
  RowDotArgs a{p, 1};
  while (a.lanes < 32 && a.lanes * (aligned ? kVector<T> : 1) < Dv) a.lanes *= 2;
  const int64_t rows_of_block = 128 / a.lanes, blocks = (rows + rows_of_block - 1) / rows_of_block;
  return launch(aligned ? attention_rowdot<T, true> : attention_rowdot<T, false>, blocks, 128, 0, stream, a);
}

}  // namespace

const char* attention_rowdot(const RowDot& p, void* stream) {
  return p.o.dtype == Dtype::kBFloat16  ? run<bf16>(p, stream)
         : p.o.dtype == Dtype::kFloat16 ? run<half>(p, stream)
                                        : "rowdot takes float16 or bfloat16";
}

}  // namespace llmfast::cuda
