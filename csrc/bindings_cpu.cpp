// pybind11 module llmfast._cpu.
#include "bindings.h"
#include "cpu/kernels.h"

using namespace llmfast;

namespace {

const cpu::Kernels* kernels = cpu::select("");

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("supported", &cpu::supported);
  m.def("isa", [] { return kernels->name; });
  m.def("select", [](const std::string& name) {
    const cpu::Kernels* found = cpu::select(name.c_str());
    if (!found) throw std::invalid_argument("LLMFAST_ISA=" + name + ": this machine runs " + cpu::supported());
    kernels = found;
  });
  m.def("peak", [](int dtype) { return kernels->peak(static_cast<Dtype>(dtype)); });
  m.def("attention_forward", [](py::handle q, py::handle k, py::handle v, py::handle o, py::handle lse,
                                const py::tuple& s, const py::tuple& e) {
    AttentionForward p{view(q), view(k), view(v), view(o), view(lse), attention_spec(s), extras(e)};
    py::gil_scoped_release release;
    kernels->attention_forward(p);
  });
  m.def("attention_backward", [](py::handle dout, py::handle q, py::handle k, py::handle v, py::handle lse, py::handle delta,
                                 py::handle dq, py::handle dk, py::handle dv, py::handle dbias, py::handle dsinks,
                                 const py::tuple& s, const py::tuple& e) {
    AttentionBackward p{view(dout), view(q),  view(k),     view(v),      Tensor{},          view(lse), view(delta), view(dq),
                        view(dk),   view(dv), view(dbias), view(dsinks), attention_spec(s), extras(e)};
    py::gil_scoped_release release;
    kernels->attention_backward(p);
  });
  m.def("rowdot", [](py::handle o, py::handle dout, py::handle delta) {
    const Tensor x = view(o), y = view(dout), d = view(delta);
    py::gil_scoped_release release;
    kernels->rowdot(x, y, d);
  });
}
