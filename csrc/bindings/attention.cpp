// Decode attention (csrc/attention).
#include "../attention/decode.h"

#include "../shm/decode_end.h"
#include "edge.h"

namespace adrenaline::bindings {
namespace {

using shm::MutableRows;
using shm::Rows;

// The KV cache of a layer; strides in elements of `item` bytes.
struct Cache {
  const void *keys, *values;
  int64_t block_stride, head_stride;
  int heads, kv_heads, head_size, block_size;
  float scale;
  int item;
};

// Get a tensor [blocks, KV heads, block size, head size] whose heads are contiguous within a block. False with an error
// set.
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

PyObject* cache_new(PyTypeObject*, PyObject* args, PyObject*) {
  return guarded([&]() -> PyObject* {
    PyObject *keys, *values;
    int heads;
    float scale;
    if (!PyArg_ParseTuple(args, "OOif", &keys, &values, &heads, &scale) || !can_read_tensors()) return nullptr;
    ADRENALINE_CHECK(attention::supported(), "this processor has no AVX-512 with bfloat16");
    DLTensor k, v;
    if (!parse_cache(keys, &k) || !parse_cache(values, &v)) return nullptr;
    for (int i = 0; i < 4; ++i)
      ADRENALINE_CHECK(k.shape[i] == v.shape[i] && k.strides[i] == v.strides[i], "keys and values differ in shape");
    ADRENALINE_CHECK(k.dtype.bits == v.dtype.bits, "keys and values differ in dtype");
    ADRENALINE_CHECK(attention::has_group(heads, k.shape[1]),
                     "so many query heads to a KV head are not supported (GROUP_SIZES)");
    auto cache = std::make_unique<Cache>();
    *cache = {static_cast<char*>(k.data) + k.byte_offset, static_cast<char*>(v.data) + v.byte_offset, k.strides[0],
              k.strides[1], heads, static_cast<int>(k.shape[1]), static_cast<int>(k.shape[3]),
              static_cast<int>(k.shape[2]), scale, k.dtype.bits / 8};
    return make(std::move(cache));
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

PyObject* attend(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes(6, count)) return nullptr;
  return guarded([&]() -> PyObject* {
    const auto* cache = get<Cache>(args[0]);
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

template <int... G>
PyObject* tuple_of(attention::Sizes<G...>) {
  PyObject* numbers[] = {PyLong_FromLong(G)...};
  PyObject* tuple = PyTuple_New(sizeof...(G));
  for (size_t i = 0; tuple != nullptr && i < sizeof...(G); ++i) PyTuple_SetItem(tuple, i, numbers[i]);
  return tuple;
}

PyMethodDef no_methods[] = {{nullptr, nullptr, 0, nullptr}};

PyMethodDef functions[] = {
    {"can_attend", can_attend, METH_NOARGS, "can_attend($module, /)\n--\n\n"},
    {"attend", cast(attend), METH_FASTCALL,
     "attend($module, cache, query, output, block_table, seq_lens, query_start_loc, /)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_attention(PyObject* module) {
  if (add_type<Cache>(module, ADRENALINE_MODULE ".KVCache", no_methods, cache_new) != 0) return -1;
  if (PyModule_AddIntConstant(module, "GROUP", attention::kGroup) != 0) return -1;
  PyObject* sizes = tuple_of(attention::GroupSizes{});
  const int added = PyModule_AddObjectRef(module, "GROUP_SIZES", sizes);
  Py_XDECREF(sizes);
  return added != 0 ? -1 : PyModule_AddFunctions(module, functions);
}

}  // namespace adrenaline::bindings
