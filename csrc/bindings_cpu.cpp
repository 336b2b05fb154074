// pybind11 module llmfast._cpu.
#include <pthread.h>
#include <sys/stat.h>

#include "eager_cpu.h"

using namespace llmfast;
using namespace llmfast::eager;

namespace {

// A child forked from a process of several threads would wait for ever for the threads of OpenMP's pool, which only the
// parent has: such a child runs on one thread. Said again before each kernel, because torch sets its number again in
// the child.
bool several_threads = false;
void before_fork() {
  struct stat tasks;  // one link for each thread and two of its own
  several_threads = stat("/proc/self/task", &tasks) == 0 && tasks.st_nlink > 3;
}
void in_child() { alone = alone || several_threads; }

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  pthread_atfork(before_fork, nullptr, in_child);
  m.def("supported", &cpu::supported);
  m.def("isa", [] { return kernels->name; });
  m.def("select", [](const std::string& name) {
    const cpu::Kernels* found = cpu::select(name.c_str());
    if (!found) throw std::invalid_argument("LLMFAST_ISA=" + name + ": this machine runs " + cpu::supported());
    kernels = found;
  });
  m.def("huge_pages", [](py::handle t) { huge_pages(view(t)); });
  m.def("record_with", [](py::object attention, py::object softmax, py::object cross_entropy) {
    attention_function = attention.release().ptr(), softmax_function = softmax.release().ptr();
    cross_entropy_function = cross_entropy.release().ptr();
  });
  m.def("peak", [](int dtype) { return kernels->peak(static_cast<Dtype>(dtype)); });
  for (PyMethodDef& f : methods) m.attr(f.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&f, nullptr));
  auto forward = [&m](const char* name, void (*cpu::Kernels::*kernel)(const AttentionForward&)) {
    m.def(name,
          [kernel](py::handle q, py::handle k, py::handle v, const py::tuple& s, const py::tuple& e, bool need_lse) {
            const Rows q_rows(q), k_rows(k), v_rows(v);
            const int64_t D = q_rows.seen.size[3], Dv = v_rows.seen.size[3];
            const py::object o = Dv == D ? empty_like(q_rows.tensor)
                                         : py::module_::import("llmfast.ops").attr("like")(q_rows.tensor, Dv);
            const py::object lse = need_lse ? empty_lse(q_rows.seen) : py::none();
            AttentionForward p{q_rows.seen, k_rows.seen, v_rows.seen, view(o), view(lse), attention_spec(s), extras(e)};
            {
              Released release;
              (kernels->*kernel)(p);
            }
            return py::make_tuple(o, lse);
          });
  };
  forward("attention_forward", &cpu::Kernels::attention_forward);
  forward("attention_decode", &cpu::Kernels::attention_decode);
  m.def("attention_backward", [](py::handle dout, py::handle q, py::handle k, py::handle v, py::handle o,
                                 py::handle lse, py::handle delta, py::handle dbias, py::handle dsinks,
                                 const py::tuple& s, const py::tuple& e) {
    const Rows do_rows(dout), q_rows(q), k_rows(k), v_rows(v), o_rows(o);
    const bool own = delta.is_none();
    const py::object dq = empty_like(q_rows.tensor), dk = empty_like(k_rows.tensor), dv = empty_like(v_rows.tensor),
                     rowsum = own ? empty_like(lse) : py::reinterpret_borrow<py::object>(delta);
    AttentionBackward p{do_rows.seen, q_rows.seen,  k_rows.seen,       v_rows.seen, o_rows.seen,
                        view(lse),    view(rowsum), view(dq),          view(dk),    view(dv),
                        view(dbias),  view(dsinks), attention_spec(s), extras(e)};
    check_saved(p);
    {
      Released release;
      if (own) kernels->rowdot(p.o, p.dout, p.delta);
      kernels->attention_backward(p);
    }
    return py::make_tuple(dq, dk, dv);
  });
  m.def("rowdot", [](py::handle o, py::handle dout, py::handle delta) {
    const Tensor x = view(o), y = view(dout), d = view(delta);
    Released release;
    kernels->rowdot(x, y, d);
  });
  m.def("linear", [](py::handle x, py::handle w, py::handle bias, py::handle y) {
    const Tensor a = view(x), b = view(w), c = view(bias), d = view(y);
    Released release;
    kernels->linear(a, b, c, d);
  });
  m.def("softmax_forward",
        [](py::handle x, py::handle y, py::handle mask, py::handle bias, double scale, int64_t offset, bool log) {
          const Softmax p{view(x), view(y), view(mask), view(bias), scale, offset, log};
          Released release;
          kernels->softmax_forward(p);
        });
  m.def("softmax_backward", [](py::handle dy, py::handle y, py::handle dx, py::handle dbias, double scale, bool log) {
    const SoftmaxBackward p{view(dy), view(y), view(dx), view(dbias), scale, log};
    Released release;
    kernels->softmax_backward(p);
  });
  m.def("cross_entropy_forward", [](py::handle x, py::handle target, py::handle loss, py::handle lse, py::handle weight,
                                    int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
    const CrossEntropy p{view(x),      view(target),    view(weight), view(loss), view(lse),
                         ignore_index, label_smoothing, z_loss,       softcap};
    Released release;
    kernels->cross_entropy_forward(p);
  });
  m.def("cross_entropy_backward",
        [](py::handle dloss, py::handle x, py::handle target, py::handle lse, py::handle dx, py::handle weight,
           int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
          const CrossEntropyBackward p{view(dloss), view(x),      view(target),    view(weight), view(lse),
                                       view(dx),    ignore_index, label_smoothing, z_loss,       softcap};
          Released release;
          kernels->cross_entropy_backward(p);
        });
}
