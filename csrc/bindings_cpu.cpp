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

// A torch.Tensor or Parameter itself, on the CPU, that asks for no gradient and whose memory holds its numbers.
bool plain(PyObject* t, bool grad) {
  static PyObject* const tensor = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
  static PyObject* const parameter =
      py::object(py::module_::import("torch").attr("nn").attr("Parameter")).release().ptr();
  static PyObject* const is_cpu = PyUnicode_InternFromString("is_cpu");
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(t));
  return (type == tensor || type == parameter) && owned(PyObject_GetAttr(t, is_cpu)).ptr() == Py_True &&
         owned(PyObject_CallMethodNoArgs(t, is_neg)).ptr() == Py_False &&
         !(grad && owned(PyObject_GetAttr(t, requires_grad)).ptr() == Py_True);
}

PyObject* attribute(const char* module, const char* name) {  // kept for the life of the process
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

bool rows_in_place(const Tensor& t) { return t.size[t.dim - 1] == 1 || t.stride[t.dim - 1] == 1; }

// A tensor as the kernels take it: a copy of it where its rows are not contiguous.
struct Rows {
  py::object tensor;
  Tensor seen;
  explicit Rows(py::handle t) : tensor(py::reinterpret_borrow<py::object>(t)), seen(view(t)) {
    if (!rows_in_place(seen)) tensor = tensor.attr("contiguous")(), seen = view(tensor);
  }
};

py::object empty_like(py::handle t) {
  static PyObject* const f = attribute("torch", "empty_like");
  return owned(PyObject_CallOneArg(f, t.ptr()));
}

py::object empty_lse(const Tensor& q) {  // (B, H, Nq) in the compute type
  static PyObject* const f = attribute("torch", "empty");
  static PyObject* const keywords = py::make_tuple("dtype").release().ptr();
  const py::tuple shape = py::make_tuple(q.size[0], q.size[1], q.size[2]);
  const Dtype type = q.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  PyObject* args[] = {shape.ptr(), names().dtypes[static_cast<int>(type)]};
  return owned(PyObject_Vectorcall(f, args, 1, keywords));
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
  } catch (std::invalid_argument&) {  // more dimensions or another dtype than view() knows
    Py_RETURN_NONE;
  }
}

Tensor four(Tensor t) {  // with dimensions of one element in front
  for (; t.dim < 4; t.dim++) {
    for (int i = 3; i; i--) t.size[i] = t.size[i - 1], t.stride[i] = t.stride[i - 1];
    t.size[0] = 1, t.stride[0] = 0;
  }
  return t;
}

// extras_fast(q, k, v, causal, scale, gqa, mask, bias, seqlens_k, cu_seqlens_q, cu_seqlens_k): attention_fast with the
// commonest extras, each None where absent. With cu_seqlens q, k and v are packed (T, H, D).
PyObject* extras_fast(PyObject*, PyObject* const* args, Py_ssize_t) {
  try {
    const bool grad = grad_enabled();
    for (int i : {0, 1, 2, 6, 7, 8, 9, 10})
      if (args[i] != Py_None && !plain(args[i], grad)) Py_RETURN_NONE;
    const bool packed = args[9] != Py_None;
    auto heads = [&](py::handle x) {  // (B, H, N, D)
      Tensor t = view(x);
      if (packed && t.dim == 3)
        t = four(t), std::swap(t.size[1], t.size[2]), std::swap(t.stride[1], t.stride[2]);
      else if (packed)
        t.dim = 0;
      return t;
    };
    const Tensor q = heads(args[0]), k = heads(args[1]), v = heads(args[2]);
    const int64_t B = q.size[0], H = q.size[1], Hk = k.size[1], Nq = q.size[2], Nk = k.size[2], D = q.size[3];
    if (q.dim != 4 || k.dim != 4 || v.dim != 4 || q.dtype > Dtype::kFloat64 || k.dtype != q.dtype || v.dtype != q.dtype)
      Py_RETURN_NONE;
    for (const Tensor* t : {&q, &k, &v})
      if (t->size[0] != B || t->size[1] != (t == &q ? H : Hk) || t->size[2] != (t == &q ? Nq : Nk) || t->size[3] != D ||
          !rows_in_place(*t))
        Py_RETURN_NONE;
    if (!Hk || H % Hk || !D || (H != Hk && args[5] != Py_True)) Py_RETURN_NONE;
    if (args[4] != Py_None && !PyFloat_CheckExact(args[4])) Py_RETURN_NONE;
    Extras e{};
    e.mask = view(args[6]), e.bias = view(args[7]);
    e.seqlens_k = view(args[8]), e.cu_seqlens_q = view(args[9]), e.cu_seqlens_k = view(args[10]);
    if ((e.mask && e.mask.dtype != Dtype::kBool) || e.bias.dtype > Dtype::kFloat64) Py_RETURN_NONE;
    for (Tensor* t : {&e.mask, &e.bias}) {
      const int64_t shape[] = {B, H, Nq, Nk};
      *t = four(*t);
      for (int i = 0; i < 4; i++)
        if (t->size[i] != 1 && t->size[i] != shape[i]) Py_RETURN_NONE;
    }
    for (const Tensor* t : {&e.seqlens_k, &e.cu_seqlens_q, &e.cu_seqlens_k})
      if (*t && (t->dtype != Dtype::kInt32 || t->dim != 1)) Py_RETURN_NONE;
    if (e.seqlens_k && e.seqlens_k.size[0] != B) Py_RETURN_NONE;
    if (packed && (!e.cu_seqlens_k || !e.cu_seqlens_q.size[0] || e.cu_seqlens_k.size[0] != e.cu_seqlens_q.size[0]))
      Py_RETURN_NONE;
    const double scale = args[4] == Py_None ? std::pow(D, -0.5) : PyFloat_AS_DOUBLE(args[4]);
    const int64_t open = int64_t{1} << 30;  // OPEN of llmfast/spec.py
    const long causal = PyLong_AsLong(args[3]);
    const py::object o = empty_like(args[0]);
    AttentionForward p{q, k, v, heads(o), Tensor{}, {scale, open, causal == 0 ? open : causal == 1 ? 0 : Nq - Nk, 0, 0},
                       e};
    {
      Released release;
      packed ? kernels->attention_forward(p) : kernels->attention_decode(p);
    }
    return py::object(o).release().ptr();
  } catch (py::error_already_set& e) {
    e.restore();
    return nullptr;
  } catch (std::invalid_argument&) {  // more dimensions or another dtype than view() knows
    Py_RETURN_NONE;
  }
}

// softmax_fast(x, dim, scale, log), the same for softmax: the last dimension, no mask or bias; None when anything is
// otherwise, or x so large that the long way takes no share of the time.
PyObject* softmax_fast(PyObject*, PyObject* const* args, Py_ssize_t) {
  try {
    if (!plain(args[0], grad_enabled()) || !PyLong_CheckExact(args[1]) || !PyFloat_CheckExact(args[2])) Py_RETURN_NONE;
    const Tensor x = view(args[0]);
    const long dim = PyLong_AsLong(args[1]);
    int64_t elements = 1;
    for (int64_t n : x.size) elements *= n;
    if (x.dtype > Dtype::kFloat64 || !x.dim || (dim != -1 && dim != x.dim - 1) || elements > 1 << 16) Py_RETURN_NONE;
    const py::object y = empty_like(args[0]);
    const Softmax p{four(x),          four(view(y)),     Tensor{}, Tensor{}, PyFloat_AS_DOUBLE(args[2]),
                    int64_t{1} << 30, args[3] == Py_True};
    if (!rows_in_place(p.x) || !rows_in_place(p.y)) Py_RETURN_NONE;
    {
      Released release;
      kernels->softmax_forward(p);
    }
    return py::object(y).release().ptr();
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
    {"extras_fast", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(extras_fast)), METH_FASTCALL, nullptr},
    {"softmax_fast", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(softmax_fast)), METH_FASTCALL, nullptr},
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
