// Tensors and specs read without torch's headers, through its C interface or Python's attributes; both bindings include
// this.
#pragma once
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "attention.h"

namespace llmfast {

namespace py = pybind11;

struct Names {  // interned attribute names and torch's dtype objects, kept for the life of the process
  PyObject *data_ptr, *shape, *stride, *dtype;
  PyObject* dtypes[7];
};

inline const Names& names() {
  static const Names n = [] {
    Names n;
    n.data_ptr = PyUnicode_InternFromString("data_ptr");
    n.shape = PyUnicode_InternFromString("shape");
    n.stride = PyUnicode_InternFromString("stride");
    n.dtype = PyUnicode_InternFromString("dtype");
    py::module_ torch = py::module_::import("torch");
    const char* dtypes[] = {"float32", "bfloat16", "float16", "float64", "bool", "int32", "int64"};
    for (int i = 0; i < 7; i++) n.dtypes[i] = py::object(torch.attr(dtypes[i])).release().ptr();
    return n;
  }();
  return n;
}

inline py::object owned(PyObject* p) {
  if (!p) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(p);
}

// torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h), found in the libtorch that runs: it reads a
// tensor in 0.1 us, Python's attributes in 0.3 us. Its handle of a tensor points to the pointer to the TensorImpl,
// which Python has as _cdata.
struct Shim {
  int32_t (*data_ptr)(void*, void**);
  int32_t (*dim)(void*, int64_t*);
  int32_t (*sizes)(void*, int64_t**);
  int32_t (*strides)(void*, int64_t**);
  int32_t (*dtype)(void*, int32_t*);
  PyObject* cdata;

  bool complete() const { return data_ptr && dim && sizes && strides && dtype; }
};

inline const Shim& shim() {
  static const Shim s = [] {
    Shim s{};
    if (void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
      auto find = [&](auto& f, const char* name) {
        f = reinterpret_cast<std::decay_t<decltype(f)>>(dlsym(torch, name));
      };
      find(s.data_ptr, "aoti_torch_get_data_ptr"), find(s.dim, "aoti_torch_get_dim");
      find(s.sizes, "aoti_torch_get_sizes"), find(s.strides, "aoti_torch_get_strides");
      find(s.dtype, "aoti_torch_get_dtype");
    }
    s.cdata = PyUnicode_InternFromString("_cdata");
    return s;
  }();
  return s;
}

inline Tensor view(py::handle t) {
  Tensor v;
  if (t.is_none()) return v;
  static char empty[64];  // an empty tensor is present
  auto at = [&](void* data) {
    for (int i = 0; i < v.dim; i++)
      if (v.size[i] == 0) return empty;
    if (!data) throw std::invalid_argument("a tensor has no memory of its own");
    return static_cast<char*>(data);
  };
  static const bool quick = shim().complete();
  if (quick) {
    const Shim& s = shim();
    void* impl = PyLong_AsVoidPtr(owned(PyObject_GetAttr(t.ptr(), s.cdata)).ptr());
    void* data = nullptr;
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    int32_t type = 0;
    if (!impl || s.data_ptr(&impl, &data) || s.dim(&impl, &dim) || s.sizes(&impl, &sizes) ||
        s.strides(&impl, &strides) || s.dtype(&impl, &type) || dim > 4)
      throw std::invalid_argument("a tensor has more than 4 dimensions or no memory of its own");
    v.dim = static_cast<int>(dim);
    for (int i = 0; i < v.dim; i++) v.size[i] = sizes[i], v.stride[i] = sizes[i] == 1 ? 0 : strides[i];
    v.data = at(data);
    constexpr int types[] = {6, 15, 5, 7, 11, 3, 4};  // c10/core/ScalarType.h, in Dtype's order
    for (int i = 0; i < 7; i++)
      if (type == types[i]) return v.dtype = static_cast<Dtype>(i), v;
    throw std::invalid_argument("a tensor has a dtype that the kernels do not know");
  }
  const Names& n = names();
  void* const data = PyLong_AsVoidPtr(owned(PyObject_CallMethodNoArgs(t.ptr(), n.data_ptr)).ptr());
  py::object shape = owned(PyObject_GetAttr(t.ptr(), n.shape)),
             stride = owned(PyObject_CallMethodNoArgs(t.ptr(), n.stride));
  v.dim = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
  if (v.dim > 4) throw std::invalid_argument("a tensor has more than 4 dimensions");
  for (int i = 0; i < v.dim; i++) {
    v.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    v.stride[i] = v.size[i] == 1 ? 0 : PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
  }
  v.data = at(data);
  py::object dtype = owned(PyObject_GetAttr(t.ptr(), n.dtype));
  for (int i = 0; i < 7; i++)
    if (dtype.ptr() == n.dtypes[i]) {
      v.dtype = static_cast<Dtype>(i);
      return v;
    }
  throw std::invalid_argument("a tensor has a dtype that the kernels do not know");
}

inline AttentionSpec attention_spec(const py::tuple& s) {
  return {s[0].cast<double>(), s[1].cast<int64_t>(), s[2].cast<int64_t>(), s[3].cast<double>(), s[4].cast<double>()};
}

inline Extras extras(const py::tuple& e) {
  return {view(e[0]), view(e[1]), view(e[2]), view(e[3]), view(e[4]), view(e[5]), view(e[6]), view(e[7]), view(e[8])};
}

}  // namespace llmfast
