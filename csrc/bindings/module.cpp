// The extension module. Its parts are in the files beside this one, its types for Python in
// vllm_adrenaline/native/_native.pyi. vllm_adrenaline/native/loader.py loads it.
#include "edge.h"

#ifndef ADRENALINE_SOURCES
#error "build through setup.py, which passes the digest of csrc/"
#endif

namespace adrenaline::bindings {
namespace {

// use_tensors(torch.Tensor.__dlpack_c_exchange_api__): how tensors are read from now on
PyObject* use_tensors(PyObject*, PyObject* capsule) {
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  if (api->header.version.major != DLPACK_MAJOR_VERSION || api->dltensor_from_py_object_no_sync == nullptr)
    return PyErr_Format(PyExc_RuntimeError, "torch offers another DLPack exchange API than %d", DLPACK_MAJOR_VERSION);
  read_tensor = api->dltensor_from_py_object_no_sync;
  return none();
}

PyMethodDef functions[] = {
    {"use_tensors", use_tensors, METH_O, "use_tensors($module, api, /)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr},
};

int execute(PyObject* module) {
  if (add_split(module) != 0 || add_channel(module) != 0 || add_attention(module) != 0) return -1;
  return PyModule_AddStringConstant(module, "SOURCES", ADRENALINE_SOURCES);
}

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(execute)}, {0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, functions, slots, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace adrenaline::bindings

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&adrenaline::bindings::definition); }
