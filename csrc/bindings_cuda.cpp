// pybind11 module llmfast._cuda; streams come as integers, an error becomes RuntimeError.
#include "bindings.h"
#include "cuda/launch.h"

using namespace llmfast;

namespace {

// Calls a launcher without the GIL.
template <class Problem>
void start(const char* (*launcher)(const Problem&, void*), const Problem& p, uintptr_t stream) {
  const char* error;
  {
    py::gil_scoped_release release;
    error = launcher(p, reinterpret_cast<void*>(stream));
  }
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("unavailable", [] { return cuda::unavailable(); });
  m.def("attention_forward", [](py::handle q, py::handle k, py::handle v, py::handle o, py::handle lse,
                                const py::tuple& s, const py::tuple& e, uintptr_t stream) {
    AttentionForward p{view(q), view(k), view(v), view(o), view(lse), attention_spec(s), extras(e)};
    start(cuda::attention_forward, p, stream);
  });
  m.def("attention_decode",
        [](py::handle q, py::handle k, py::handle v, py::handle o, py::handle lse, py::handle parts, py::handle sums,
           py::handle counters, const py::tuple& s, const py::tuple& e, uintptr_t stream) {
          cuda::AttentionDecode p{{view(q), view(k), view(v), view(o), view(lse), attention_spec(s), extras(e)},
                                  view(parts),
                                  view(sums),
                                  view(counters)};
          start(cuda::attention_decode, p, stream);
        });
  m.def("attention_rowdot", [](py::handle o, py::handle dout, py::handle delta, uintptr_t stream) {
    start(cuda::attention_rowdot, cuda::RowDot{view(o), view(dout), view(delta)}, stream);
  });
  m.def("attention_backward",
        [](py::handle dout, py::handle q, py::handle k, py::handle v, py::handle lse, py::handle delta, py::handle dq,
           py::handle dk, py::handle dv, const py::tuple& s, const py::tuple& e, uintptr_t stream) {
          AttentionBackward p{view(dout), view(q),  view(k),  view(v),  Tensor{}, view(lse),         view(delta),
                              view(dq),   view(dk), view(dv), Tensor{}, Tensor{}, attention_spec(s), extras(e)};
          start(cuda::attention_backward, p, stream);
        });
  m.def("cross_entropy", [](py::handle x, py::handle target, py::handle weight, py::handle weight_sum, py::handle loss,
                            py::handle lse, py::handle dx, const py::tuple& s, uintptr_t stream) {
    cuda::CrossEntropy p{
        view(x),  view(target),         view(weight),        view(weight_sum),    view(loss),         view(lse),
        view(dx), s[0].cast<int64_t>(), s[1].cast<double>(), s[2].cast<double>(), s[3].cast<double>()};
    start(cuda::cross_entropy, p, stream);
  });
  m.def("softmax_forward", [](py::handle x, py::handle y, const py::tuple& s, const py::tuple& e, uintptr_t stream) {
    Softmax p{view(x), view(y), view(e[0]), view(e[1]), s[0].cast<double>(), s[1].cast<int64_t>(), s[2].cast<bool>()};
    start(cuda::softmax_forward, p, stream);
  });
  m.def("softmax_backward", [](py::handle dy, py::handle y, py::handle dx, double scale, bool log, uintptr_t stream) {
    SoftmaxBackward p{view(dy), view(y), view(dx), Tensor{}, scale, log};
    start(cuda::softmax_backward, p, stream);
  });
}
