// Splitting a batch by pool (csrc/plan), once a step.
#include "../plan/split.h"

#include "edge.h"

namespace adrenaline::bindings {
namespace {

using plan::Batch;
using plan::Split;

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

// -> (split, executors, whether there are local rows, how many rows are mapped, lost rows)
PyObject* split_batch(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *table, *starts, *lens, *received, *slots, *bases, *local_table, *local_lens;
    unsigned int block_size;
    if (!PyArg_ParseTuple(args, "OOOO!OIO!OO", &table, &starts, &lens, &PyList_Type, &received, &slots, &block_size,
                          &PyList_Type, &bases, &local_table, &local_lens) ||
        !can_read_tensors())
      return nullptr;
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
    std::vector<int64_t> mapped_bases;
    for (Py_ssize_t i = 0; i < PyList_Size(bases); ++i) {
      mapped_bases.push_back(PyLong_AsLongLong(PyList_GetItem(bases, i)));
      ADRENALINE_CHECK(mapped_bases.back() >= plan::kNotMapped && mapped_bases.back() <= INT32_MAX - plan::kIndexMask,
                       "no such base");
    }
    const Batch batch{static_cast<uint32_t>(rows), static_cast<uint32_t>(t.shape[1]), table_data, t.strides[0],
                      starts_data, lens_data, slots_data, static_cast<uint32_t>(m.shape[0]), block_size};
    auto result = std::make_unique<Split>(plan::split(batch, is_received, mapped_bases, local_data, local_lens_data));
    PyObject* has_local = result->has_local ? Py_True : Py_False;
    const unsigned int num_mapped = result->num_mapped;
    PyObject* lost = list_of(result->lost);
    std::vector<long> numbers;
    for (const auto& [executor, plan] : result->remote) numbers.push_back(executor);
    PyObject* executors = list_of(numbers);
    return Py_BuildValue("NNOIN", make(std::move(result)), executors, has_local, num_mapped, lost);
  });
}

// What an executor has in the batch. Null, with a Python error set, if it has nothing.
const plan::RowsPlan* plan_of(PyObject* split, PyObject* executor) {
  const long number = PyLong_AsLong(executor);
  if (number == -1 && PyErr_Occurred() != nullptr) return nullptr;
  return &self_of<Split>(split).remote.at(static_cast<unsigned>(number));
}

// -> the executor's rows in the batch
PyObject* rows(PyObject* self, PyObject* executor) {
  return guarded([&]() -> PyObject* {
    const auto* plan = plan_of(self, executor);
    return plan == nullptr ? nullptr : list_of(plan->rows);
  });
}

// -> its tokens' positions in the batch
PyObject* tokens(PyObject* self, PyObject* executor) {
  return guarded([&]() -> PyObject* {
    const auto* plan = plan_of(self, executor);
    return plan == nullptr ? nullptr : list_of(plan->tokens);
  });
}

PyMethodDef methods[] = {
    {"rows", rows, METH_O, "rows($self, executor, /)\n--\n\n"},
    {"tokens", tokens, METH_O, "tokens($self, executor, /)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr},
};

PyMethodDef functions[] = {
    {"split", split_batch, METH_VARARGS,
     "split($module, block_table, query_start_loc, seq_lens, received_rows, slot_mapping, block_size,\n"
     "      mapped_bases, local_block_table, local_seq_lens, /)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_split(PyObject* module) {
  if (add_type<Split>(module, ADRENALINE_MODULE ".Split", methods, nullptr) != 0) return -1;
  if (PyModule_AddIntConstant(module, "INDEX_BITS", plan::kIndexBits) != 0) return -1;
  if (PyModule_AddIntConstant(module, "MAX_EXECUTORS", plan::kMaxExecutors) != 0) return -1;
  if (PyModule_AddIntConstant(module, "MAPPED", plan::kMapped) != 0) return -1;
  if (PyModule_AddIntConstant(module, "NOT_MAPPED", plan::kNotMapped) != 0) return -1;
  return PyModule_AddFunctions(module, functions);
}

}  // namespace adrenaline::bindings
