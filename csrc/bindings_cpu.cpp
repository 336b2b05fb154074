// pybind11 module llmfast._cpu.
#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cmath>

#include "bindings.h"
#include "cpu/kernels.h"

using namespace llmfast;

namespace {

const cpu::Kernels* kernels = cpu::select("");

// A child forked from a process of several threads would wait for ever for the threads of OpenMP's pool, which only the
// parent has: such a child runs on one thread. Said again before each kernel, because torch sets its number again in
// the child.
bool several_threads = false, alone = false;
void before_fork() {
  struct stat tasks;  // one link for each thread and two of its own
  several_threads = stat("/proc/self/task", &tasks) == 0 && tasks.st_nlink > 3;
}
void in_child() { alone = alone || several_threads; }

struct Released {  // around every kernel
  py::gil_scoped_release gil;
  Released() {
    if (alone) omp_set_num_threads(1);
  }
};

bool grad_enabled() {
  static PyObject* const enabled = py::object(py::module_::import("torch").attr("is_grad_enabled")).release().ptr();
  return owned(PyObject_CallNoArgs(enabled)).ptr() == Py_True;
}

// A torch.Tensor or Parameter itself, on the CPU, that asks for no gradient.
bool plain(PyObject* t, bool grad) {
  static PyObject* const tensor = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
  static PyObject* const parameter =
      py::object(py::module_::import("torch").attr("nn").attr("Parameter")).release().ptr();
  static PyObject* const is_cpu = PyUnicode_InternFromString("is_cpu");
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(t));
  return (type == tensor || type == parameter) && owned(PyObject_GetAttr(t, is_cpu)).ptr() == Py_True &&
         !(grad && owned(PyObject_GetAttr(t, requires_grad)).ptr() == Py_True);
}

// The commonest call in one step, 4 us instead of 10: attention_fast(q, k, v, causal, scale, gqa) with causal 0, 1
// (bottom-right) or 2 (top-left) and scale a float or None. Plain strided CPU tensors of one dtype and matching shapes,
// no gradient; None when anything is otherwise, and then llmfast/functional.py takes the long way, which also words the
// errors.
PyObject* attention_fast(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  static PyObject* const empty_like = py::object(py::module_::import("torch").attr("empty_like")).release().ptr();
  try {
    const bool grad = grad_enabled();
    Tensor t[3];
    for (int i = 0; i < 3; i++) {
      if (!plain(args[i], grad)) Py_RETURN_NONE;
      t[i] = view(args[i]);
    }
    const Tensor &q = t[0], &k = t[1], &v = t[2];
    const int64_t H = q.size[1], Hk = k.size[1], Nq = q.size[2], Nk = k.size[2], D = q.size[3];
    const bool floats = q.dtype == Dtype::kFloat32 || q.dtype == Dtype::kBFloat16 || q.dtype == Dtype::kFloat16;
    if (!floats || k.dtype != q.dtype || v.dtype != q.dtype || q.dim != 4 || k.dim != 4 || v.dim != 4) Py_RETURN_NONE;
    for (int i = 0; i < 3; i++)
      if (k.size[i] != v.size[i] || t[i].stride[3] > 1) Py_RETURN_NONE;
    if (q.size[0] != k.size[0] || k.size[3] != D || v.size[3] != D || !Hk || H % Hk || !D) Py_RETURN_NONE;
    if (H != Hk && args[5] != Py_True) Py_RETURN_NONE;
    if (args[4] != Py_None && !PyFloat_CheckExact(args[4])) Py_RETURN_NONE;
    const double scale = args[4] == Py_None ? 1 / std::sqrt(static_cast<double>(D)) : PyFloat_AS_DOUBLE(args[4]);
    const int64_t open = int64_t{1} << 30;  // OPEN of llmfast/spec.py
    const long causal = PyLong_AsLong(args[3]);
    const AttentionSpec spec{scale, open, causal == 0 ? open : causal == 1 ? 0 : Nq - Nk, 0, 0};
    py::object o = owned(PyObject_CallOneArg(empty_like, args[0]));
    AttentionForward p{q, k, v, view(o), Tensor{}, spec, Extras{}};
    {
      Released release;
      kernels->attention_decode(p);
    }
    return o.release().ptr();
  } catch (py::error_already_set& e) {
    e.restore();
    return nullptr;
  } catch (std::invalid_argument&) {  // more dimensions or another dtype than view() knows
    Py_RETURN_NONE;
  }
}

// The same for linear_fast(x, weight, bias or None): 1 to 16 rows, at any leading dimensions that are one stride.
PyObject* linear_fast(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
  try {
    const bool grad = grad_enabled();
    Tensor t[3];
    for (int i = 0; i < (args[2] == Py_None ? 2 : 3); i++) {
      if (!plain(args[i], grad)) Py_RETURN_NONE;
      t[i] = view(args[i]);
    }
    const Tensor &w = t[1], &bias = t[2];
    const int dim = t[0].dim;
    const bool floats = w.dtype == Dtype::kFloat32 || w.dtype == Dtype::kBFloat16 || w.dtype == Dtype::kFloat16;
    if (!floats || dim < 1 || w.dim != 2 || t[0].dtype != w.dtype || t[0].size[dim - 1] != w.size[1]) Py_RETURN_NONE;
    if (bias && (bias.dim != 1 || bias.size[0] != w.size[0] || bias.dtype != w.dtype)) Py_RETURN_NONE;
    if (t[0].stride[dim - 1] > 1 || w.stride[1] > 1 || !w.size[0] || !w.size[1]) Py_RETURN_NONE;
    Tensor x = t[0];  // (rows, D)
    x.dim = 2, x.size[0] = 1, x.stride[0] = 0, x.size[1] = w.size[1], x.stride[1] = 1;
    PyObject* shape[5] = {args[0]};
    py::object sizes[4];
    for (int d = dim - 1; d >= 0; d--) {
      const int64_t n = d == dim - 1 ? w.size[0] : t[0].size[d];
      shape[d + 1] = (sizes[d] = owned(PyLong_FromLongLong(n))).ptr();
      if (d == dim - 1 || n == 1) continue;
      if (x.size[0] == 1) {
        x.stride[0] = t[0].stride[d];
      } else if (t[0].stride[d] != x.stride[0] * x.size[0]) {
        Py_RETURN_NONE;
      }
      x.size[0] *= n;
    }
    if (x.size[0] < 1 || x.size[0] > 16) Py_RETURN_NONE;
    py::object o = owned(PyObject_VectorcallMethod(new_empty, shape, dim + 1, nullptr));
    Tensor y = view(o);
    y.dim = 2, y.size[0] = x.size[0], y.size[1] = y.stride[0] = w.size[0], y.stride[1] = 1;
    {
      Released release;
      kernels->linear(x, w, bias, y);
    }
    return o.release().ptr();
  } catch (py::error_already_set& e) {
    e.restore();
    return nullptr;
  } catch (std::invalid_argument&) {
    Py_RETURN_NONE;
  }
}

PyMethodDef fast[] = {
    {"attention_fast", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(attention_fast)), METH_FASTCALL,
     nullptr},
    {"linear_fast", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear_fast)), METH_FASTCALL, nullptr}};

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
  m.def("huge_pages", [](py::handle t) {  // an advice: a kernel without huge pages may refuse it
    const auto start = t.attr("data_ptr")().cast<uintptr_t>(), end = start + t.attr("nbytes").cast<uintptr_t>();
    const uintptr_t page = 4096, first = (start + page - 1) / page * page;
    if (first < end) madvise(reinterpret_cast<void*>(first), (end - first) / page * page, MADV_HUGEPAGE);
  });
  m.def("peak", [](int dtype) { return kernels->peak(static_cast<Dtype>(dtype)); });
  for (PyMethodDef& f : fast) m.attr(f.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&f, nullptr));
  auto forward = [&m](const char* name, void (*cpu::Kernels::*kernel)(const AttentionForward&)) {
    m.def(name, [kernel](py::handle q, py::handle k, py::handle v, py::handle o, py::handle lse, const py::tuple& s,
                         const py::tuple& e) {
      AttentionForward p{view(q), view(k), view(v), view(o), view(lse), attention_spec(s), extras(e)};
      Released release;
      (kernels->*kernel)(p);
    });
  };
  forward("attention_forward", &cpu::Kernels::attention_forward);
  forward("attention_decode", &cpu::Kernels::attention_decode);
  m.def("attention_backward",
        [](py::handle dout, py::handle q, py::handle k, py::handle v, py::handle lse, py::handle delta, py::handle dq,
           py::handle dk, py::handle dv, py::handle dbias, py::handle dsinks, const py::tuple& s, const py::tuple& e) {
          AttentionBackward p{view(dout), view(q),  view(k),  view(v),     Tensor{},     view(lse),         view(delta),
                              view(dq),   view(dk), view(dv), view(dbias), view(dsinks), attention_spec(s), extras(e)};
          Released release;
          kernels->attention_backward(p);
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
