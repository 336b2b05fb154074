// The commonest eager calls in one step, 4 us instead of 10: plain strided CPU tensors of matching shapes and dtypes.
// Each returns None when anything is otherwise, and then llmfast/functional.py takes the long way, which also words the
// errors. Where a gradient is needed, an autograd.Function records the result, and its backward is one step here too.
#pragma once
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <memory>

#include "bindings.h"
#include "cpu/kernels.h"

namespace llmfast::eager {

inline const cpu::Kernels* kernels = cpu::select("");
inline bool alone = false;  // see in_child in bindings_cpu.cpp

inline PyObject* attribute(const char* module, const char* name) {  // kept for the life of the process
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

// OpenMP counts threads for each thread that asks; torch tells it torch.set_num_threads when that one asks torch.
inline void count_threads() {
  static PyObject* const asked = attribute("torch", "get_num_threads");
  static thread_local const bool known = !owned(PyObject_CallNoArgs(asked)).is_none();
  static_cast<void>(known);
}

class Released {  // around every kernel: other threads may run Python
  PyThreadState* const state = (count_threads(), PyEval_SaveThread());

 public:
  Released() {
    if (alone) omp_set_num_threads(1);
  }
  ~Released() { PyEval_RestoreThread(state); }
};

constexpr int64_t kOpen = int64_t{1} << 30;  // OPEN of llmfast/spec.py

inline bool grad_enabled() {
  static PyObject* const enabled = attribute("torch", "is_grad_enabled");
  return owned(PyObject_CallNoArgs(enabled)).ptr() == Py_True;
}

inline PyObject* private_attribute(const char* module, const char* name) {  // nullptr where this torch has none
  const py::object found = py::getattr(py::module_::import(module), name, py::none());
  return found.is_none() ? nullptr : py::object(found).release().ptr();
}

// Ordinary eager code: no modes, transforms, tracing or autocast, no `use_backend` or `explain` around the call.
inline bool undisturbed() {
  static PyObject *const modes = private_attribute("torch._C", "_len_torch_dispatch_stack"),
                         *const transforms = private_attribute("torch._C._functorch", "peek_interpreter_stack"),
                         *const tracing = private_attribute("torch._C", "_get_tracing_state"),
                         *const forward_mode = attribute("torch.autograd", "forward_ad"),
                         *const level = PyUnicode_InternFromString("_current_level"),
                         *const autocast = attribute("torch", "is_autocast_enabled"),
                         *const cpu = py::str("cpu").release().ptr(),
                         *const forced = attribute("llmfast.backends", "_forced"),
                         *const explaining = attribute("llmfast.backends", "_explaining");
  static const bool known = modes && transforms && tracing && py::hasattr(forward_mode, level);
  if (!known) return false;
  if (PyObject_IsTrue(owned(PyObject_CallNoArgs(modes)).ptr()) || !owned(PyObject_CallNoArgs(transforms)).is_none() ||
      !owned(PyObject_CallNoArgs(tracing)).is_none() ||
      PyLong_AsLong(owned(PyObject_GetAttr(forward_mode, level)).ptr()) >= 0 ||
      owned(PyObject_CallOneArg(autocast, cpu)).ptr() == Py_True)
    return false;
  auto holds = [](PyObject* variable, PyObject* value) {
    PyObject* found = nullptr;
    if (PyContextVar_Get(variable, nullptr, &found) < 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found).ptr() == value;
  };
  return holds(forced, Py_None) && holds(explaining, Py_False);
}

// A torch.Tensor or Parameter itself, on the CPU, whose memory holds its numbers.
inline bool plain(PyObject* t) {
  static PyObject *const tensor = attribute("torch", "Tensor"), *const parameter = attribute("torch.nn", "Parameter"),
                         *const is_cpu = PyUnicode_InternFromString("is_cpu"),
                         *const is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(t));
  return (type == tensor || type == parameter) && owned(PyObject_GetAttr(t, is_cpu)).ptr() == Py_True &&
         owned(PyObject_CallMethodNoArgs(t, is_neg)).ptr() == Py_False;
}

inline bool requires_grad(PyObject* t) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  return owned(PyObject_GetAttr(t, name)).ptr() == Py_True;
}

inline bool rows_in_place(const Tensor& t) {
  return t.size[t.dim - 1] == 1 || t.stride[t.dim - 1] == 1 || t.size[0] * t.size[1] * t.size[2] * t.size[3] == 0;
}

// A tensor as the kernels take it: a copy of it where its rows are not contiguous.
struct Rows {
  py::object tensor;
  Tensor seen;
  explicit Rows(py::handle t) : tensor(py::reinterpret_borrow<py::object>(t)), seen(view(t)) {
    if (!rows_in_place(seen)) tensor = tensor.attr("contiguous")(), seen = view(tensor);
  }
};

inline py::object empty_like(py::handle t) {
  static PyObject* const f = attribute("torch", "empty_like");
  return owned(PyObject_CallOneArg(f, t.ptr()));
}

// A large output like x asks for huge pages, as a fault for each 4 KiB takes longer than the kernel.
inline void huge_pages(const Tensor& t) {
  const uintptr_t elements = t.size[0] * t.size[1] * t.size[2] * t.size[3];
  const uintptr_t bytes = elements * (t.dtype == Dtype::kFloat32 ? 4 : t.dtype == Dtype::kFloat64 ? 8 : 2);
  if (bytes < 8 << 20) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(t.data), page = 4096, first = (start + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), (start + bytes - first) / page * page, MADV_HUGEPAGE);  // may be refused
}

inline bool is_float(const Tensor& t) { return t.dtype <= Dtype::kFloat64; }
inline Dtype wide(Dtype x) { return x == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

inline py::object empty(const py::tuple& shape, Dtype dtype) {
  static PyObject* const f = attribute("torch", "empty");
  static PyObject *const keywords = py::make_tuple("dtype", "device").release().ptr(),
                         *const cpu = py::str("cpu").release().ptr();  // whatever torch's default device is
  PyObject* args[] = {shape.ptr(), names().dtypes[static_cast<int>(dtype)], cpu};
  return owned(PyObject_Vectorcall(f, args, 1, keywords));
}

inline py::object empty_lse(const Tensor& q) {  // (B, H, Nq)
  return empty(py::make_tuple(q.size[0], q.size[1], q.size[2]), wide(q.dtype));
}

inline Tensor four(Tensor t) {  // with dimensions of one element in front
  for (; t.dim < 4; t.dim++) {
    for (int i = 3; i; i--) t.size[i] = t.size[i - 1], t.stride[i] = t.stride[i - 1];
    t.size[0] = 1, t.stride[0] = 0;
  }
  return t;
}

// (B, H, N, D) of a tensor, or of a packed one (T, H, D); dim = 0 where it is neither
inline Tensor heads(const Tensor& x, bool packed) {
  Tensor t = x;
  if (packed && t.dim == 3) {
    t = four(t), std::swap(t.size[1], t.size[2]), std::swap(t.stride[1], t.stride[2]);
  } else if (packed || t.dim != 4) {
    t.dim = 0;
  }
  return t;
}

// The result of f as METH_FASTCALL functions give it: nullptr is None, a Python error goes on.
template <class F>
PyObject* answer(F&& f) {
  try {
    const py::object result = f();
    if (!result) Py_RETURN_NONE;
    return py::object(result).release().ptr();
  } catch (py::error_already_set& e) {
    e.restore();
    return nullptr;
  } catch (std::invalid_argument&) {  // more dimensions or another dtype than view() knows
    Py_RETURN_NONE;
  }
}

// apply of the autograd.Functions in llmfast/backends/cpu.py
inline PyObject *attention_function = nullptr, *softmax_function = nullptr, *cross_entropy_function = nullptr;

// `result`, with a backward that will find `saved` and `numbers`
inline py::object record(PyObject* function, std::initializer_list<PyObject*> inputs, py::object result,
                         py::tuple saved, py::tuple numbers) {
  const py::tuple done = py::make_tuple(std::move(result), std::move(saved), std::move(numbers));
  PyObject* args[4];
  PyObject** last = std::copy(inputs.begin(), inputs.end(), args);
  *last++ = done.ptr();
  return owned(PyObject_Vectorcall(function, args, last - args, nullptr));
}

// gradient(d, saved, numbers) by f; None where it is differentiated again, traced or forced, or f gives nothing
template <class F>
PyObject* gradient(PyObject* const* args, F&& f) {
  return answer([&]() -> py::object {
    const py::tuple saved = py::reinterpret_borrow<py::tuple>(args[1]);
    if (grad_enabled() || !undisturbed() || !plain(args[0])) return {};
    for (py::handle t : saved)
      if (!t.is_none() && !plain(t.ptr())) return {};
    return f(args[0], saved, py::reinterpret_borrow<py::tuple>(args[2]));
  });
}

// (left, right) of AttentionSpec from causal and window as `attention` takes them; false where the long way must look
inline bool band(PyObject* causal, PyObject* window, int64_t shift, AttentionSpec& spec) {
  const bool top_left = PyUnicode_Check(causal) && PyUnicode_CompareWithASCIIString(causal, "top_left") == 0;
  if (!top_left && causal != Py_True && causal != Py_False) return false;
  spec.left = kOpen, spec.right = causal == Py_False ? kOpen : 0;
  if (window != Py_None) {
    if (!PyLong_CheckExact(window)) return false;
    const long w = PyLong_AsLong(window);
    if (w < 1 || w > kOpen) return PyErr_Clear(), false;
    spec.left = w - 1, spec.right = std::min(spec.right, spec.left);
  }
  if (top_left) spec.left += spec.left == kOpen ? 0 : -shift, spec.right += shift;
  return true;
}

// attention_fast(q, k, v, causal, scale, gqa, window, softcap, mask, bias, seqlens_k, cu_seqlens_q, cu_seqlens_k): o.
// scale is a float or None, softcap a float, the tensors None where absent; with cu_seqlens q, k and v are packed (T,
// H, D).
inline PyObject* attention_fast(PyObject*, PyObject* const* args, Py_ssize_t) {
  enum { kQ, kK, kV, kCausal, kScale, kGqa, kWindow, kSoftcap, kMask, kBias, kSeqlens, kCuQ, kCuK };
  return answer([&]() -> py::object {
    if (!undisturbed()) return {};
    bool grad = false, extra = false;
    const bool recorded = grad_enabled();
    for (int i : {kQ, kK, kV, kMask, kBias, kSeqlens, kCuQ, kCuK}) {
      if (i >= kMask && args[i] == Py_None) continue;
      if (!plain(args[i])) return {};
      extra |= i >= kMask;
      if (recorded && requires_grad(args[i])) {
        if (i >= kMask) return {};
        grad = true;
      }
    }
    const bool packed = args[kCuQ] != Py_None;
    const Tensor q = heads(view(args[kQ]), packed), k = heads(view(args[kK]), packed),
                 v = heads(view(args[kV]), packed);
    const int64_t B = q.size[0], H = q.size[1], Hk = k.size[1], Nq = q.size[2], Nk = k.size[2], D = q.size[3];
    if (!q.dim || !k.dim || !v.dim || q.dtype > Dtype::kFloat64 || k.dtype != q.dtype || v.dtype != q.dtype) return {};
    for (const Tensor* t : {&q, &k, &v})
      if (t->size[0] != B || t->size[1] != (t == &q ? H : Hk) || t->size[2] != (t == &q ? Nq : Nk) || t->size[3] != D ||
          !rows_in_place(*t))
        return {};
    if (!Hk || H % Hk || !D || (H != Hk && args[kGqa] != Py_True)) return {};
    AttentionSpec spec{std::pow(D, -0.5), 0, 0, 0, 0};
    for (auto [i, number] : {std::pair{kScale, &spec.scale}, {kSoftcap, &spec.softcap}}) {
      if (i == kScale && args[i] == Py_None) continue;
      if (!PyFloat_CheckExact(args[i])) return {};
      *number = PyFloat_AS_DOUBLE(args[i]);
    }
    if (!(spec.softcap >= 0 && std::isfinite(spec.softcap))) return {};
    Extras e{};
    if (extra) {
      e.mask = view(args[kMask]), e.bias = view(args[kBias]);
      e.seqlens_k = view(args[kSeqlens]), e.cu_seqlens_q = view(args[kCuQ]), e.cu_seqlens_k = view(args[kCuK]);
      if ((e.mask && e.mask.dtype != Dtype::kBool) || !is_float(e.bias)) return {};
      for (Tensor* t : {&e.mask, &e.bias}) {
        const int64_t shape[] = {B, H, Nq, Nk};
        *t = four(*t);
        for (int i = 0; i < 4; i++)
          if (t->size[i] != 1 && t->size[i] != shape[i]) return {};
      }
      for (const Tensor* t : {&e.seqlens_k, &e.cu_seqlens_q, &e.cu_seqlens_k})
        if (*t && (t->dtype != Dtype::kInt32 || t->dim != 1)) return {};
      if (e.seqlens_k && (e.seqlens_k.size[0] != B || grad)) return {};
      if (packed && (!e.cu_seqlens_k || !e.cu_seqlens_q.size[0] || e.cu_seqlens_k.size[0] != e.cu_seqlens_q.size[0]))
        return {};
    }
    if (!band(args[kCausal], args[kWindow], packed || e.seqlens_k ? 0 : Nq - Nk, spec)) return {};
    py::object o = empty_like(args[kQ]), lse = grad ? empty_lse(q) : py::none();
    const AttentionForward p{q, k, v, heads(view(o), packed), view(lse), spec, e};
    {
      Released release;
      packed || grad ? kernels->attention_forward(p) : kernels->attention_decode(p);
    }
    if (!grad) return o;
    auto given = [&](int i) { return py::reinterpret_borrow<py::object>(args[i]); };
    py::tuple saved = py::make_tuple(given(kQ), given(kK), given(kV), o, lse);
    if (extra)
      saved =
          py::make_tuple(given(kQ), given(kK), given(kV), o, lse, given(kMask), given(kBias), given(kCuQ), given(kCuK));
    return record(attention_function, {args[kQ], args[kK], args[kV]}, o, std::move(saved),
                  py::make_tuple(spec.scale, spec.left, spec.right, spec.softcap, spec.dropout_p));
  });
}

// Hooks on saved tensors may give back other ones, and a kernel trusts their shapes.
inline void check_saved(const AttentionBackward& p) {
  auto is = [](const Tensor& t, std::initializer_list<int64_t> size) {
    return t.dim == static_cast<int>(size.size()) && std::equal(size.begin(), size.end(), t.size);
  };
  auto broadcasts = [&](const Tensor& t) {
    const int64_t whole[] = {p.q.size[0], p.q.size[1], p.q.size[2], p.k.size[2]};
    for (int i = 0; t && i < 4; i++)
      if (t.size[i] != 1 && t.size[i] != whole[i]) return false;
    return true;
  };
  const int64_t B = p.q.size[0], H = p.q.size[1], Nq = p.q.size[2], D = p.q.size[3], Hk = p.k.size[1], Nk = p.k.size[2],
                Dv = p.v.size[3];
  const bool right = is(p.q, {B, H, Nq, D}) && is(p.k, {B, Hk, Nk, D}) && is(p.v, {B, Hk, Nk, Dv}) &&
                     (Hk ? H % Hk : H) == 0 && is(p.o, {B, H, Nq, Dv}) && is(p.dout, {B, H, Nq, Dv}) &&
                     is(p.lse, {B, H, Nq}) && is(p.delta, {B, H, Nq}) && p.delta.dtype == p.lse.dtype &&
                     broadcasts(p.extras.mask) && broadcasts(p.extras.bias);
  bool one_dtype = p.lse.dtype == wide(p.q.dtype);
  for (const Tensor* t : {&p.k, &p.v, &p.o, &p.dout}) one_dtype &= t->dtype == p.q.dtype;
  if (!right || !one_dtype)
    throw std::invalid_argument("a tensor saved for the gradient has another shape or dtype now");
}

// saved is (q, k, v, o, lse, and where one is given mask, bias, cu_seqlens_q, cu_seqlens_k); gives (dq, dk, dv, None)
inline PyObject* attention_gradient(PyObject*, PyObject* const* args, Py_ssize_t) {
  return gradient(args, [](PyObject* d, py::tuple saved, py::tuple spec) -> py::object {
    Extras e{};
    if (saved.size() > 5) {
      e.mask = four(view(saved[5])), e.bias = four(view(saved[6]));
      e.cu_seqlens_q = view(saved[7]), e.cu_seqlens_k = view(saved[8]);
    }
    const bool packed = bool(e.cu_seqlens_q);
    const Rows dout(d);
    auto seen = [&](py::handle t) { return heads(view(t), packed); };
    AttentionBackward p{};
    p.dout = heads(dout.seen, packed), p.q = seen(saved[0]), p.k = seen(saved[1]), p.v = seen(saved[2]);
    p.o = seen(saved[3]), p.lse = view(saved[4]), p.spec = attention_spec(spec), p.extras = e;
    for (const Tensor* t : {&p.q, &p.k, &p.v, &p.o, &p.dout})
      if (!rows_in_place(*t)) return {};
    const py::object dq = empty_like(saved[0]), dk = empty_like(saved[1]), dv = empty_like(saved[2]);
    p.dq = seen(dq), p.dk = seen(dk), p.dv = seen(dv), p.delta = p.lse;
    const int64_t H = p.lse.size[1], N = p.lse.size[2];
    const std::unique_ptr<double[]> delta(new double[p.lse.size[0] * H * N]);
    p.delta.data = reinterpret_cast<char*>(delta.get());
    p.delta.stride[0] = H * N, p.delta.stride[1] = N, p.delta.stride[2] = 1;
    check_saved(p);
    {
      Released release;
      kernels->rowdot(p.o, p.dout, p.delta);
      kernels->attention_backward(p);
    }
    return py::make_tuple(dq, dk, dv, py::none());
  });
}

// Whether the softmax kernels take the two: rows that are contiguous in both, or lie side by side in both.
inline bool side_by_side(const Tensor& x, const Tensor& y) {
  if (rows_in_place(x)) return rows_in_place(y);
  return x.stride[2] == 1 && y.stride[2] == 1 && y.stride[3] != 1;
}

// (L0, L1, M, N) of a tensor of up to 4 dimensions, whose softmax goes over dim and whose last dimension is M otherwise
inline Tensor over(const Tensor& t, int dim) {
  Tensor f = four(t);
  for (int i = dim + 4 - t.dim; i < 3; i++)
    std::swap(f.size[i], f.size[i + 1]), std::swap(f.stride[i], f.stride[i + 1]);
  return f;
}

// softmax_fast(x, dim, scale, log)
inline PyObject* softmax_fast(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> py::object {
    if (!undisturbed() || !plain(args[0]) || !PyLong_CheckExact(args[1]) || !PyFloat_CheckExact(args[2])) return {};
    const bool grad = grad_enabled() && requires_grad(args[0]);
    const Tensor x = view(args[0]);
    const long given = PyLong_AsLong(args[1]), dim = given < 0 ? given + x.dim : given;
    if (!is_float(x) || dim < 0 || dim >= x.dim) return {};
    const py::object y = empty_like(args[0]);
    const Tensor out = view(y);
    const Softmax p{over(x, dim), over(out, dim),    Tensor{}, Tensor{}, PyFloat_AS_DOUBLE(args[2]),
                    kOpen,        args[3] == Py_True};
    if (!side_by_side(p.x, p.y)) return {};
    huge_pages(out);
    {
      Released release;
      kernels->softmax_forward(p);
    }
    if (!grad) return y;
    return record(softmax_function, {args[0]}, y, py::make_tuple(y), py::make_tuple(p.scale, p.log, dim));
  });
}

// saved is (y,), numbers (scale, log, dim); gives (dx, None)
inline PyObject* softmax_gradient(PyObject*, PyObject* const* args, Py_ssize_t) {
  return gradient(args, [](PyObject* d, py::tuple saved, py::tuple numbers) -> py::object {
    const py::object y = saved[0];
    const int dim = numbers[2].cast<int>();
    const py::object dx = empty_like(y);
    const Tensor out = view(y);
    Tensor dout = view(d);
    if (dout.dtype != out.dtype) return {};
    const Tensor seen = over(out, dim), turned = over(dout, dim);
    py::object copy;  // where dy lies otherwise than y and can't be read so
    if (!side_by_side(seen, turned) && (rows_in_place(seen) || turned.stride[3] != 1))
      copy = empty_like(y).attr("copy_")(py::handle(d)), dout = view(copy);
    const SoftmaxBackward p{over(dout, dim),           over(out, dim),         over(view(dx), dim), Tensor{},
                            numbers[0].cast<double>(), numbers[1].cast<bool>()};
    huge_pages(p.dx);
    {
      Released release;
      kernels->softmax_backward(p);
    }
    return py::make_tuple(dx, py::none());
  });
}

inline int64_t counted(const Tensor& target, int64_t ignore_index) {
  int64_t n = 0;
  for (int64_t i = 0; i < target.size[0]; i++)
    n += reinterpret_cast<const int64_t*>(target.data)[i * target.stride[0]] != ignore_index;
  return n;
}

// cross_entropy_fast(logits (T, V), target, ignore_index, label_smoothing, z_loss, softcap, reduction, inplace): the
// loss
inline PyObject* cross_entropy_fast(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> py::object {
    if (!undisturbed() || !plain(args[0]) || !plain(args[1]) || !PyLong_CheckExact(args[2]) ||
        !PyUnicode_Check(args[6]))
      return {};
    const bool grad = grad_enabled() && requires_grad(args[0]);
    const Tensor x = view(args[0]), target = view(args[1]);
    const int64_t T = x.size[0], V = x.size[1];
    if (x.dim != 2 || target.dim != 1 || !is_float(x) || target.dtype != Dtype::kInt64 || target.size[0] != T || !T ||
        !rows_in_place(x))
      return {};
    int overflow = 0;
    CrossEntropy p{x, target, Tensor{}, Tensor{}, Tensor{}, PyLong_AsLongLongAndOverflow(args[2], &overflow), 0, 0, 0};
    if (overflow) return {};
    for (auto [i, number] : {std::pair{3, &p.label_smoothing}, {4, &p.z_loss}, {5, &p.softcap}}) {
      if (!PyFloat_CheckExact(args[i])) return {};
      *number = PyFloat_AS_DOUBLE(args[i]);
    }
    if (!(p.label_smoothing >= 0 && p.label_smoothing <= 1 && p.softcap >= 0 && std::isfinite(p.softcap))) return {};
    for (int64_t i = 0; i < T; i++) {
      const int64_t y = reinterpret_cast<const int64_t*>(target.data)[i * target.stride[0]];
      if ((y < 0 || y >= V) && y != p.ignore_index) return {};
    }
    const bool mean = PyUnicode_CompareWithASCIIString(args[6], "mean") == 0,
               none = PyUnicode_CompareWithASCIIString(args[6], "none") == 0;
    if (!mean && !none && PyUnicode_CompareWithASCIIString(args[6], "sum") != 0) return {};
    const py::object loss = empty(none ? py::make_tuple(T) : py::tuple(0), wide(x.dtype));
    const py::object lse = grad ? empty(py::make_tuple(T), wide(x.dtype)) : py::none();
    const std::unique_ptr<double[]> rows(new double[2 * T]);
    const Tensor total = view(loss);
    p.loss.dtype = p.lse.dtype = total.dtype, p.loss.dim = p.lse.dim = 1, p.loss.size[0] = p.lse.size[0] = T;
    p.loss.stride[0] = p.lse.stride[0] = 1;
    p.loss.data = none ? total.data : reinterpret_cast<char*>(rows.get());
    p.lse.data = grad ? view(lse).data : reinterpret_cast<char*>(rows.get() + T);
    {
      Released release;
      kernels->cross_entropy_forward(p);
    }
    const double divisor = mean ? static_cast<double>(counted(target, p.ignore_index)) : 1;
    auto reduce = [&](auto* of, auto* to) {
      double sum = 0;
      for (int64_t i = 0; i < T; i++) sum += of[i];
      *to = sum / divisor;
    };
    if (!none && total.dtype == Dtype::kFloat64)
      reduce(rows.get(), reinterpret_cast<double*>(total.data));
    else if (!none)
      reduce(reinterpret_cast<float*>(rows.get()), reinterpret_cast<float*>(total.data));
    if (!grad) return loss;
    auto given = [&](int i) { return py::reinterpret_borrow<py::object>(args[i]); };
    return record(cross_entropy_function, {args[0], args[1]}, loss, py::make_tuple(given(0), given(1), lse),
                  py::make_tuple(p.ignore_index, p.label_smoothing, p.z_loss, p.softcap, divisor, given(7)));
  });
}

// saved is (x, target, lse), numbers the spec, what a mean divides by and inplace; gives (dx, None, None)
inline PyObject* cross_entropy_gradient(PyObject*, PyObject* const* args, Py_ssize_t) {
  return gradient(args, [](PyObject* d, py::tuple saved, py::tuple numbers) -> py::object {
    const py::object x = saved[0], dx = numbers[5].ptr() == Py_True ? x : empty_like(x);
    CrossEntropyBackward p{view(d),
                           view(x),
                           view(saved[1]),
                           Tensor{},
                           view(saved[2]),
                           view(dx),
                           numbers[0].cast<int64_t>(),
                           numbers[1].cast<double>(),
                           numbers[2].cast<double>(),
                           numbers[3].cast<double>()};
    if (p.x.dim != 2 || p.dloss.dtype != p.lse.dtype || !rows_in_place(p.x) || !rows_in_place(p.dx)) return {};
    huge_pages(p.dx);
    alignas(8) char one[8];  // dloss of each row
    if (!p.dloss.dim) {
      const double divisor = numbers[4].cast<double>();
      if (p.dloss.dtype == Dtype::kFloat64) {
        new (one) double(*reinterpret_cast<double*>(p.dloss.data) / divisor);
      } else {
        new (one) float(*reinterpret_cast<float*>(p.dloss.data) / divisor);
      }
      p.dloss.data = one, p.dloss.stride[0] = 0;
    }
    {
      Released release;
      kernels->cross_entropy_backward(p);
    }
    return py::make_tuple(dx, py::none(), py::none());
  });
}

// linear_fast(x, weight, bias or None), without gradient: 1 to 16 rows, at any leading dimensions that are one stride.
inline PyObject* linear_fast(PyObject*, PyObject* const* args, Py_ssize_t) {
  static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
  return answer([&]() -> py::object {
    if (!undisturbed()) return {};
    const bool grad = grad_enabled();
    Tensor t[3];
    for (int i = 0; i < (args[2] == Py_None ? 2 : 3); i++) {
      if (!plain(args[i]) || (grad && requires_grad(args[i]))) return {};
      t[i] = view(args[i]);
    }
    const Tensor &w = t[1], &bias = t[2];
    const int dim = t[0].dim;
    const bool floats = w.dtype == Dtype::kFloat32 || w.dtype == Dtype::kBFloat16 || w.dtype == Dtype::kFloat16;
    if (!floats || dim < 1 || w.dim != 2 || t[0].dtype != w.dtype || t[0].size[dim - 1] != w.size[1]) return {};
    if (bias && (bias.dim != 1 || bias.size[0] != w.size[0] || bias.dtype != w.dtype)) return {};
    if (!rows_in_place(t[0]) || !rows_in_place(w) || !w.size[0] || !w.size[1]) return {};
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
        return {};
      }
      x.size[0] *= n;
    }
    if (x.size[0] < 1 || x.size[0] > 16) return {};
    py::object o = owned(PyObject_VectorcallMethod(new_empty, shape, dim + 1, nullptr));
    Tensor y = view(o);
    y.dim = 2, y.size[0] = x.size[0], y.size[1] = y.stride[0] = w.size[0], y.stride[1] = 1;
    {
      Released release;
      kernels->linear(x, w, bias, y);
    }
    return o;
  });
}

template <auto F>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(F)), METH_FASTCALL, nullptr};
}
inline PyMethodDef methods[] = {method<attention_fast>("attention_fast"),
                                method<attention_gradient>("attention_gradient"),
                                method<softmax_fast>("softmax_fast"),
                                method<softmax_gradient>("softmax_gradient"),
                                method<cross_entropy_fast>("cross_entropy_fast"),
                                method<cross_entropy_gradient>("cross_entropy_gradient"),
                                method<linear_fast>("linear_fast")};

}  // namespace llmfast::eager
