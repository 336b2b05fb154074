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
  auto forward = [&m](const char* name, void (*cpu::Kernels::*kernel)(const AttentionForward&)) {
    m.def(name, [kernel](py::handle q, py::handle k, py::handle v, py::handle o, py::handle lse, const py::tuple& s,
                         const py::tuple& e) {
      AttentionForward p{view(q), view(k), view(v), view(o), view(lse), attention_spec(s), extras(e)};
      py::gil_scoped_release release;
      (kernels->*kernel)(p);
    });
  };
  forward("attention_forward", &cpu::Kernels::attention_forward);
  forward("attention_decode", &cpu::Kernels::attention_decode);
}
