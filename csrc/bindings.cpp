// The Python edge of csrc/: plain numbers and capsules, CPython's limited API, no torch. Tensors are read through DLPack's
// exchange API, which makes no Python objects; data_ptr() and stride() would take 190 ns a tensor (docs/performance.md).
// vllm_adrenaline/native.py loads this.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <memory>

#include "attention/decode.h"
#include "shm/decode_end.h"
#include "shm/executor_end.h"
#include "third_party/dlpack.h"

#ifndef ADRENALINE_SOURCES
#error "build through setup.py, which passes the digest of csrc/"
#endif

namespace {

namespace attention = adrenaline::attention;
using namespace adrenaline::shm;
using adrenaline::plan::Batch;
using adrenaline::plan::Split;

constexpr char kDecode[] = "adrenaline.decode_end";
constexpr char kSteps[] = "adrenaline.step_ends";
constexpr char kSplit[] = "adrenaline.split";
constexpr char kExecutor[] = "adrenaline.executor_end";
constexpr char kCache[] = "adrenaline.kv_cache";

// The KV cache of a layer; strides in elements of `item` bytes.
struct Cache {
  const void *keys, *values;
  int64_t block_stride, head_stride;
  int heads, kv_heads, head_size, block_size;
  float scale;
  int item;
};

struct Steps {
  StepEnds ends;
  int64_t q_row, kv_row;
};

DLPackDLTensorFromPyObjectNoSync read_tensor = nullptr;

template <typename T>
T* get(PyObject* capsule, const char* name) {
  return static_cast<T*>(PyCapsule_GetPointer(capsule, name));
}

template <typename T>
PyObject* make(std::unique_ptr<T> object, const char* name, PyCapsule_Destructor destroy) {
  PyObject* capsule = PyCapsule_New(object.get(), name, destroy);
  if (capsule != nullptr) object.release();
  return capsule;
}

template <typename T, const char* name>
void destroy(PyObject* capsule) {
  delete get<T>(capsule, name);
}

// Run `body`, which may throw or leave a Python error set; null then.
template <typename Body>
PyObject* guarded(Body&& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

template <typename T>
PyObject* list_of(const std::vector<T>& numbers) {
  PyObject* list = PyList_New(0);
  for (T value : numbers) {
    PyObject* number = PyLong_FromLong(value);
    PyList_Append(list, number);
    Py_DECREF(number);
  }
  return list;
}

template <typename Body>
void without_lock(Body&& body) {
  PyThreadState* state = PyEval_SaveThread();
  body();
  PyEval_RestoreThread(state);
}

bool parse_shape(PyObject* tuple, Shape* s) {
  unsigned long long n[6];
  if (!PyArg_ParseTuple(tuple, "KKKKKK", &n[0], &n[1], &n[2], &n[3], &n[4], &n[5])) return false;
  *s = Shape{n[0], n[1], n[2], n[3], n[4], n[5]};
  return true;
}

// The rows of a tensor [T, heads, head size] on the CPU whose heads lie side by side, `row` bytes in all; anything else
// would be read wrongly. A dimension of size one has no stride to speak of.
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

// use_tensors(torch.Tensor.__dlpack_c_exchange_api__): how tensors are read from now on
PyObject* use_tensors(PyObject*, PyObject* capsule) {
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  if (api->header.version.major != DLPACK_MAJOR_VERSION || api->dltensor_from_py_object_no_sync == nullptr)
    return PyErr_Format(PyExc_RuntimeError, "torch offers another DLPack exchange API than %d", DLPACK_MAJOR_VERSION);
  read_tensor = api->dltensor_from_py_object_no_sync;
  return none();
}

// A contiguous CPU tensor of `ndim` dimensions and integers of type T.
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

// split(block_table, query_start_loc, seq_lens, rows received, slot_mapping, block size, local_table, local_lens)
// -> (split, executors, whether there are local rows)
PyObject* split_batch(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *table, *starts, *lens, *received, *slots, *local_table, *local_lens;
    unsigned int block_size;
    if (!PyArg_ParseTuple(args, "OOOO!OIOO", &table, &starts, &lens, &PyList_Type, &received, &slots, &block_size,
                          &local_table, &local_lens))
      return nullptr;
    ADRENALINE_CHECK(read_tensor != nullptr, "use_tensors was not called");
    DLTensor t, s, l, m, lt, ll;
    const auto* table_data = parse_integers<int32_t>(table, 2, &t);
    const auto* starts_data = table_data != nullptr ? parse_integers<int32_t>(starts, 1, &s) : nullptr;
    const auto* lens_data = starts_data != nullptr ? parse_integers<int32_t>(lens, 1, &l) : nullptr;
    auto* slots_data = lens_data != nullptr ? parse_integers<int64_t>(slots, 1, &m) : nullptr;
    auto* local_data = slots_data != nullptr ? parse_integers<int32_t>(local_table, 2, &lt) : nullptr;
    auto* local_lens_data = local_data != nullptr ? parse_integers<int32_t>(local_lens, 1, &ll) : nullptr;
    if (local_lens_data == nullptr) return nullptr;
    const int64_t rows = t.shape[0];
    ADRENALINE_CHECK(s.shape[0] == rows + 1 && l.shape[0] == rows && ll.shape[0] == rows, "lengths of a batch differ");
    ADRENALINE_CHECK(lt.shape[0] == rows && lt.shape[1] == t.shape[1] && (lt.strides[0] == t.shape[1] || rows == 1),
                     "local block table of another size");
    std::vector<bool> is_received(rows);
    for (Py_ssize_t i = 0; i < PyList_Size(received); ++i) {
      const long row = PyLong_AsLong(PyList_GetItem(received, i));
      ADRENALINE_CHECK(row >= 0 && row < rows, "no such row");
      is_received[row] = true;
    }
    const Batch batch{static_cast<uint32_t>(rows), static_cast<uint32_t>(t.shape[1]), table_data, t.strides[0],
                      starts_data, lens_data, slots_data, static_cast<uint32_t>(m.shape[0]), block_size};
    auto result = std::make_unique<Split>(adrenaline::plan::split(batch, is_received, local_data, local_lens_data));
    const bool has_local = result->has_local;
    std::vector<long> places;
    for (const auto& [executor, plan] : result->remote) places.push_back(executor);
    PyObject* executors = list_of(places);
    PyObject* capsule = make(std::move(result), kSplit, destroy<Split, kSplit>);
    return Py_BuildValue("NNO", capsule, executors, has_local ? Py_True : Py_False);
  });
}

// split_rows(split, executor) -> the executor's rows in the batch
PyObject* split_rows(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject* capsule;
    unsigned int executor;
    if (!PyArg_ParseTuple(args, "OI", &capsule, &executor)) return nullptr;
    const auto* split = get<Split>(capsule, kSplit);
    if (split == nullptr) return nullptr;
    return list_of(split->remote.at(executor).rows);
  });
}

PyObject* layout(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    Shape s;
    if (!parse_shape(args, &s)) return nullptr;
    const Layout at = layout_of(s);
    return Py_BuildValue("{s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n}", "query_start_loc", at.query_start_loc, "seq_lens",
                         at.seq_lens, "block_table", at.block_table, "slot_mapping", at.slot_mapping, "q", at.q, "k",
                         at.k, "v", at.v, "out", at.out, "total", at.total);
  });
}

PyObject* decode_open(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    unsigned long long memory, epoch;
    PyObject* sizes;
    Shape s;
    if (!PyArg_ParseTuple(args, "KO!K", &memory, &PyTuple_Type, &sizes, &epoch) || !parse_shape(sizes, &s))
      return nullptr;
    return make(std::make_unique<DecodeEnd>(reinterpret_cast<void*>(memory), s, epoch), kDecode,
                destroy<DecodeEnd, kDecode>);
  });
}

PyObject* decode_watch(PyObject*, PyObject* args) {
  PyObject* capsule;
  int pidfd, shared;
  long long timeout_ns;
  if (!PyArg_ParseTuple(args, "OiLp", &capsule, &pidfd, &timeout_ns, &shared)) return nullptr;
  auto* end = get<DecodeEnd>(capsule, kDecode);
  if (end == nullptr) return nullptr;
  end->watch(pidfd, timeout_ns, shared != 0);
  return none();
}

PyObject* decode_counters(PyObject*, PyObject* capsule) {
  const auto* end = get<DecodeEnd>(capsule, kDecode);
  if (end == nullptr) return nullptr;
  const Header& h = end->header();
  return Py_BuildValue("KKK", static_cast<unsigned long long>(h.rows.load()),
                       static_cast<unsigned long long>(h.layers.load()),
                       static_cast<unsigned long long>(h.busy_ns.load()));
}

// decode_is_closed(end): whether the executor will answer nothing any more, and said so
PyObject* decode_is_closed(PyObject*, PyObject* capsule) {
  const auto* end = get<DecodeEnd>(capsule, kDecode);
  return end == nullptr ? nullptr : PyBool_FromLong(end->is_closed());
}

PyObject* steps_open(PyObject*, PyObject* args) {
  long long q_row, kv_row;
  if (!PyArg_ParseTuple(args, "LL", &q_row, &kv_row)) return nullptr;
  if (read_tensor == nullptr) return PyErr_Format(PyExc_RuntimeError, "use_tensors was not called");
  auto steps = std::make_unique<Steps>();
  steps->q_row = q_row;
  steps->kv_row = kv_row;
  return make(std::move(steps), kSteps, destroy<Steps, kSteps>);
}

PyObject* steps_clear(PyObject*, PyObject* capsule) {
  auto* steps = get<Steps>(capsule, kSteps);
  if (steps == nullptr) return nullptr;
  steps->ends.clear();
  return none();
}

// steps_add(steps, split, executor, decode end or None)
PyObject* steps_add(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *capsule, *split_capsule, *channel;
    unsigned int executor;
    if (!PyArg_ParseTuple(args, "OOIO", &capsule, &split_capsule, &executor, &channel)) return nullptr;
    auto* steps = get<Steps>(capsule, kSteps);
    const auto* split = get<Split>(split_capsule, kSplit);
    auto* end = channel == Py_None ? nullptr : get<DecodeEnd>(channel, kDecode);
    if (PyErr_Occurred()) return nullptr;
    steps->ends.add(executor, end, split->remote.at(executor), steps->q_row);
    return none();
  });
}

// send(steps, layer, q, k, v)
PyObject* send(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5) return PyErr_Format(PyExc_TypeError, "send takes 5 arguments");
  auto* steps = get<Steps>(args[0], kSteps);
  if (steps == nullptr) return nullptr;
  const auto layer = PyLong_AsUnsignedLongLong(args[1]);
  Rows q, k, v;
  if (!parse_rows(args[2], steps->q_row, &q) || !parse_rows(args[3], steps->kv_row, &k) ||
      !parse_rows(args[4], steps->kv_row, &v))
    return nullptr;
  steps->ends.send(layer, q, k, v);
  return none();
}

// receive(steps, layer, out) -> executors that failed in this layer, as bits
PyObject* receive(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "receive takes 3 arguments");
  auto* steps = get<Steps>(args[0], kSteps);
  if (steps == nullptr) return nullptr;
  const auto layer = PyLong_AsUnsignedLongLong(args[1]);
  MutableRows out;
  if (!parse_rows(args[2], steps->q_row, &out)) return nullptr;
  return PyLong_FromUnsignedLongLong(
      steps->ends.receive(layer, out, [](auto&& sleep) { without_lock(sleep); }));
}

PyObject* steps_times(PyObject*, PyObject* capsule) {
  const auto* steps = get<Steps>(capsule, kSteps);
  if (steps == nullptr) return nullptr;
  const StepTimes& times = steps->ends.times();
  return Py_BuildValue("LL", static_cast<long long>(times.local_ns), static_cast<long long>(times.wait_ns));
}

// A tensor [blocks, KV heads, block size, head size] whose heads are contiguous within a block.
bool parse_cache(PyObject* object, DLTensor* t) {
  if (read_tensor(object, t) != 0) return false;
  const bool is_float = (t->dtype.code == kDLBfloat && t->dtype.bits == 16) || (t->dtype.code == kDLFloat && t->dtype.bits == 32);
  const bool fits = t->ndim == 4 && t->device.device_type == kDLCPU && is_float && t->dtype.lanes == 1 &&
                    t->strides[3] == 1 && t->strides[2] == t->shape[3] && t->shape[2] % attention::kGroup == 0 &&
                    t->shape[3] % attention::kGroup == 0;
  if (!fits) PyErr_SetString(PyExc_ValueError, "a KV cache [blocks, heads, block size, head size] is wanted, bfloat16 or float32");
  return fits;
}

PyObject* can_attend(PyObject*, PyObject*) { return PyBool_FromLong(attention::supported()); }

// cache_open(keys, values, query heads, scale): the KV cache of a layer, for `attend`. The caller keeps the tensors alive.
PyObject* cache_open(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *keys, *values;
    int heads;
    float scale;
    if (!PyArg_ParseTuple(args, "OOif", &keys, &values, &heads, &scale)) return nullptr;
    ADRENALINE_CHECK(read_tensor != nullptr, "use_tensors was not called");
    ADRENALINE_CHECK(attention::supported(), "this processor has no AVX-512 with bfloat16");
    DLTensor k, v;
    if (!parse_cache(keys, &k) || !parse_cache(values, &v)) return nullptr;
    for (int i = 0; i < 4; ++i)
      ADRENALINE_CHECK(k.shape[i] == v.shape[i] && k.strides[i] == v.strides[i], "keys and values differ in shape");
    ADRENALINE_CHECK(k.dtype.bits == v.dtype.bits, "keys and values differ in dtype");
    ADRENALINE_CHECK(attention::has_group(heads, k.shape[1]), "1, 2, 4 or 8 query heads to a KV head are supported");
    auto cache = std::make_unique<Cache>();
    *cache = {static_cast<char*>(k.data) + k.byte_offset, static_cast<char*>(v.data) + v.byte_offset, k.strides[0],
              k.strides[1], heads, static_cast<int>(k.shape[1]), static_cast<int>(k.shape[3]),
              static_cast<int>(k.shape[2]), scale, k.dtype.bits / 8};
    return make(std::move(cache), kCache, destroy<Cache, kCache>);
  });
}

template <typename T>
void attend_as(const Cache& cache, const Rows& q, const MutableRows& out, const DLTensor& table, const int32_t* blocks,
               const int32_t* lens, const int32_t* starts, int64_t rows) {
  const auto elements = [](int64_t bytes) { return bytes / static_cast<int64_t>(sizeof(T)); };
  const attention::Call<T> call{reinterpret_cast<const T*>(q.data), static_cast<const T*>(cache.keys),
                                static_cast<const T*>(cache.values), reinterpret_cast<T*>(out.data), blocks, lens,
                                starts, rows, table.strides[0], elements(q.stride), elements(out.stride),
                                cache.block_stride, cache.head_stride, cache.heads, cache.kv_heads, cache.head_size,
                                cache.block_size, cache.scale};
  // Kept between calls: once it has grown, no layer asks for memory.
  thread_local std::vector<float> scratch;
  if (const size_t needed = attention::scratch_of(call); scratch.size() < needed) scratch.resize(2 * needed);
  without_lock([&] { attention::attend(call, scratch.data()); });
}

// attend(cache, q, out, block_table, seq_lens, query_start_loc): decode attention of rows of at most one token
PyObject* attend(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) return PyErr_Format(PyExc_TypeError, "attend takes 6 arguments");
  return guarded([&]() -> PyObject* {
    const auto* cache = get<Cache>(args[0], kCache);
    if (cache == nullptr) return nullptr;
    const int64_t row = static_cast<int64_t>(cache->heads) * cache->head_size * cache->item;
    Rows q;
    MutableRows out;
    DLTensor t, l, s;
    if (!parse_rows(args[1], row, &q) || !parse_rows(args[2], row, &out)) return nullptr;
    const auto* blocks = parse_integers<int32_t>(args[3], 2, &t);
    const auto* lens = blocks != nullptr ? parse_integers<int32_t>(args[4], 1, &l) : nullptr;
    const auto* starts = lens != nullptr ? parse_integers<int32_t>(args[5], 1, &s) : nullptr;
    if (starts == nullptr) return nullptr;
    const int64_t rows = l.shape[0];
    ADRENALINE_CHECK(t.shape[0] >= rows && s.shape[0] > rows, "lengths of a batch differ");
    (cache->item == 2 ? attend_as<attention::Bf16> : attend_as<float>)(*cache, q, out, t, blocks, lens, starts, rows);
    return none();
  });
}

// executor_open(memory, sizes, epoch, shared core, query_start_loc, seq_lens, block_table, slot_mapping); addresses
PyObject* executor_open(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    unsigned long long memory, epoch, starts, lens, table, slots;
    PyObject* sizes;
    int shared;
    Shape s;
    if (!PyArg_ParseTuple(args, "KO!KpKKKK", &memory, &PyTuple_Type, &sizes, &epoch, &shared, &starts, &lens, &table,
                          &slots) ||
        !parse_shape(sizes, &s))
      return nullptr;
    const PlanCopy copy{reinterpret_cast<int32_t*>(starts), reinterpret_cast<int32_t*>(lens),
                        reinterpret_cast<int32_t*>(table), reinterpret_cast<int64_t*>(slots)};
    return make(std::make_unique<ExecutorEnd>(reinterpret_cast<void*>(memory), s, epoch, shared != 0, copy), kExecutor,
                destroy<ExecutorEnd, kExecutor>);
  });
}

// -> (step, rows, padded rows, padded tokens), or None when the end was stopped
PyObject* executor_next(PyObject*, PyObject* capsule) {
  return guarded([&]() -> PyObject* {
    auto* end = get<ExecutorEnd>(capsule, kExecutor);
    if (end == nullptr) return nullptr;
    Status status = Status::ready;
    without_lock([&] { status = end->next_plan(); });
    if (status == Status::ended) return none();
    ADRENALINE_CHECK(end->take_plan(), "step plan does not fit its channel");
    return Py_BuildValue("KIII", static_cast<unsigned long long>(end->step()), end->num_rows(), end->padded_rows(),
                         end->padded_tokens());
  });
}

// executor_wait(end, layer, timeout in ns) -> Status
PyObject* executor_wait(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "executor_wait takes 3 arguments");
  auto* end = get<ExecutorEnd>(args[0], kExecutor);
  if (end == nullptr) return nullptr;
  const auto layer = PyLong_AsUnsignedLongLong(args[1]);
  const auto timeout = PyLong_AsLongLong(args[2]);
  if (PyErr_Occurred()) return nullptr;
  Status status = Status::ready;
  without_lock([&] {
    if (!end->spin_for(layer)) status = end->sleep_for(layer, timeout);
    if (status == Status::ready) status = end->arrived(layer);
  });
  return PyLong_FromLong(static_cast<int>(status));
}

// executor_reply(end, layer, rows)
PyObject* executor_reply(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "executor_reply takes 3 arguments");
  auto* end = get<ExecutorEnd>(args[0], kExecutor);
  if (end == nullptr) return nullptr;
  const auto layer = PyLong_AsUnsignedLongLong(args[1]);
  const auto rows = PyLong_AsUnsignedLongLong(args[2]);
  if (PyErr_Occurred()) return nullptr;
  end->reply(layer, rows);
  return none();
}

PyObject* executor_stop(PyObject*, PyObject* capsule) {
  auto* end = get<ExecutorEnd>(capsule, kExecutor);
  if (end == nullptr) return nullptr;
  end->stop();
  return none();
}

PyObject* executor_close(PyObject*, PyObject* capsule) {
  auto* end = get<ExecutorEnd>(capsule, kExecutor);
  if (end == nullptr) return nullptr;
  end->close();
  return none();
}

template <typename Function>
PyCFunction cast(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"layout", layout, METH_VARARGS, nullptr},
    {"use_tensors", use_tensors, METH_O, nullptr},
    {"split", split_batch, METH_VARARGS, nullptr},
    {"split_rows", split_rows, METH_VARARGS, nullptr},
    {"decode_open", decode_open, METH_VARARGS, nullptr},
    {"decode_watch", decode_watch, METH_VARARGS, nullptr},
    {"decode_counters", decode_counters, METH_O, nullptr},
    {"decode_is_closed", decode_is_closed, METH_O, nullptr},
    {"steps_open", steps_open, METH_VARARGS, nullptr},
    {"steps_clear", steps_clear, METH_O, nullptr},
    {"steps_add", steps_add, METH_VARARGS, nullptr},
    {"steps_times", steps_times, METH_O, nullptr},
    {"send", cast(send), METH_FASTCALL, nullptr},
    {"receive", cast(receive), METH_FASTCALL, nullptr},
    {"can_attend", can_attend, METH_NOARGS, nullptr},
    {"cache_open", cache_open, METH_VARARGS, nullptr},
    {"attend", cast(attend), METH_FASTCALL, nullptr},
    {"executor_open", executor_open, METH_VARARGS, nullptr},
    {"executor_next", executor_next, METH_O, nullptr},
    {"executor_wait", cast(executor_wait), METH_FASTCALL, nullptr},
    {"executor_reply", cast(executor_reply), METH_FASTCALL, nullptr},
    {"executor_stop", executor_stop, METH_O, nullptr},
    {"executor_close", executor_close, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

int execute(PyObject* module) {
  return PyModule_AddStringConstant(module, "SOURCES", ADRENALINE_SOURCES);
}

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(execute)}, {0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&definition); }
