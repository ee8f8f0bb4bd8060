// What all files of the Python edge share: objects of ours in Python, errors, tensors. CPython's limited API, no torch.
//
// What a layer needs is a method of an object, not a function that is handed a capsule: the bound method is made once,
// and its `self` needs neither a look-up nor a check. Tensors are read through DLPack's exchange API, which makes no
// Python objects; data_ptr() and stride() would take 190 ns a tensor (docs/performance.md).
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "../check.h"
#include "../third_party/dlpack.h"

// Where the extension module lies; types are named by it.
#define ADRENALINE_MODULE "vllm_adrenaline.native._native"

namespace adrenaline::bindings {

// Add what each file has to the module; -1 with a Python error set.
int add_split(PyObject* module);
int add_channel(PyObject* module);
int add_attention(PyObject* module);

// A Python object that owns a T. Types are made once a process and kept: the library cannot serve two interpreters.
template <typename T>
struct Object {
  PyObject_HEAD
  T* value;
};

template <typename T>
inline PyTypeObject* type_of = nullptr;

// The T of a method's `self`, whose type the interpreter has checked.
template <typename T>
T& self_of(PyObject* self) {
  return *reinterpret_cast<Object<T>*>(self)->value;
}

// The T of an argument. Null, with a TypeError set, if the argument is anything else.
template <typename T>
T* get(PyObject* object) {
  if (Py_TYPE(object) == type_of<T>) return &self_of<T>(object);
  PyErr_SetString(PyExc_TypeError, "an object of another type of this library is wanted");
  return nullptr;
}

// A new Python object that owns `value`; null with a Python error set.
template <typename T>
PyObject* make(std::unique_ptr<T> value) {
  PyObject* object = PyType_GenericAlloc(type_of<T>, 0);
  if (object != nullptr) reinterpret_cast<Object<T>*>(object)->value = value.release();
  return object;
}

template <typename T>
void destroy(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  delete reinterpret_cast<Object<T>*>(object)->value;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(object);
  Py_DECREF(type);
}

// Add the type of Object<T> to the module, under the full `name`. `construct` is its __new__; null where only functions
// of ours make such objects. -1 with a Python error set.
template <typename T>
int add_type(PyObject* module, const char* name, PyMethodDef* methods, newfunc construct) {
  if (type_of<T> == nullptr) {
    PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(destroy<T>)},
                           {Py_tp_methods, methods},
                           {construct != nullptr ? Py_tp_new : 0, reinterpret_cast<void*>(construct)},
                           {0, nullptr}};
    const unsigned int sealed = construct != nullptr ? 0 : Py_TPFLAGS_DISALLOW_INSTANTIATION;
    PyType_Spec spec{name, sizeof(Object<T>), 0, static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | sealed), slots};
    type_of<T> = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
    if (type_of<T> == nullptr) return -1;
  }
  return PyModule_AddType(module, type_of<T>);
}

// Run `body` and return what it returns. Null if it throws; a Python error is set then.
template <typename Body>
PyObject* guarded(Body&& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// Run `body`, which touches no Python object, without the interpreter's lock.
template <typename Body>
void without_lock(Body&& body) {
  PyThreadState* state = PyEval_SaveThread();
  body();
  PyEval_RestoreThread(state);
}

inline PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

// How Python calls methods that a layer needs: an array of arguments instead of a tuple made for the call.
using FastFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

inline PyCFunction cast(FastFunction function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// Whether a call has as many arguments as it needs; else a TypeError is set.
inline bool takes(Py_ssize_t wanted, Py_ssize_t count) {
  if (count != wanted) PyErr_Format(PyExc_TypeError, "%zd arguments are wanted, not %zd", wanted, count);
  return count == wanted;
}

// Reads a torch.Tensor. Null until use_tensors() was called, as vllm_adrenaline/native/library.py does at once.
inline DLPackDLTensorFromPyObjectNoSync read_tensor = nullptr;

// Whether use_tensors() was called; else a RuntimeError is set.
inline bool can_read_tensors() {
  if (read_tensor == nullptr) PyErr_SetString(PyExc_RuntimeError, "use_tensors was not called");
  return read_tensor != nullptr;
}

// Get the rows of a CPU tensor [T, heads, head size] whose heads lie side by side, `row` bytes in all. Anything else
// would be read wrongly: false then, with a ValueError set. A dimension of size one has no stride to speak of.
template <typename R>
bool parse_rows(PyObject* object, int64_t row, R* rows) {
  DLTensor t;
  if (read_tensor(object, &t) != 0) return false;
  const int64_t item = t.dtype.bits / 8 * t.dtype.lanes;
  const bool fits = t.ndim == 3 && t.device.device_type == kDLCPU && t.shape[1] * t.shape[2] * item == row &&
                    (t.strides[2] == 1 || t.shape[2] == 1) && (t.strides[1] == t.shape[2] || t.shape[1] == 1);
  if (!fits) {
    PyErr_SetString(PyExc_ValueError, "a CPU tensor [T, heads, head size] whose heads are contiguous is wanted");
    return false;
  }
  rows->data = static_cast<decltype(rows->data)>(t.data) + t.byte_offset;
  rows->stride = t.strides[0] * item;
  return true;
}

// The data of a CPU tensor of `ndim` dimensions and integers of type T. One dimension must be contiguous; of two, each
// row. Null, with a Python error set, for anything else.
template <typename T>
T* parse_integers(PyObject* object, int ndim, DLTensor* t) {
  if (read_tensor(object, t) != 0) return nullptr;
  const bool rows_only = ndim == 2 && (t->strides[1] == 1 || t->shape[1] == 1);
  const bool fits = t->ndim == ndim && t->device.device_type == kDLCPU && t->dtype.code == kDLInt &&
                    t->dtype.bits == 8 * sizeof(T) && t->dtype.lanes == 1 &&
                    (rows_only || (ndim == 1 && (t->strides[0] == 1 || t->shape[0] <= 1)));
  if (!fits) {
    PyErr_Format(PyExc_ValueError, "a contiguous CPU tensor of %d dimension(s) of int%d is wanted", ndim,
                 static_cast<int>(8 * sizeof(T)));
    return nullptr;
  }
  return reinterpret_cast<T*>(static_cast<char*>(t->data) + t->byte_offset);
}

}  // namespace adrenaline::bindings
