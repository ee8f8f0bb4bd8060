// Both ends of a channel (csrc/shm): the decode worker's, its steps over all of its channels, and the executor's.
#include <cstddef>

#include "../shm/decode_end.h"
#include "../shm/executor_end.h"
#include "edge.h"

namespace adrenaline::bindings {

// steps_add() takes one; its methods are in split.cpp.
using plan::Split;

namespace {

using namespace shm;

// The steps of a decode worker. A row of q has `q_row` bytes, one of k or of v `kv_row`.
struct Steps {
  StepEnds ends;
  int64_t q_row, kv_row;
};

bool parse_shape(PyObject* tuple, Shape* s) {
  unsigned long long n[6];
  if (!PyArg_ParseTuple(tuple, "KKKKKK", &n[0], &n[1], &n[2], &n[3], &n[4], &n[5])) return false;
  *s = Shape{n[0], n[1], n[2], n[3], n[4], n[5]};
  return true;
}

PyObject* layout(PyObject*, PyObject* sizes) {
  return guarded([&]() -> PyObject* {
    Shape s;
    if (!parse_shape(sizes, &s)) return nullptr;
    const Layout at = layout_of(s);
    const auto word = [](size_t offset) { return static_cast<Py_ssize_t>(offset); };
    return Py_BuildValue("{s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n}", "plan",
                         word(offsetof(Header, plan)), "sent", word(offsetof(Header, sent)), "counts",
                         word(offsetof(Header, num_rows)), "done", word(offsetof(Header, done)), "closed",
                         word(offsetof(Header, closed)), "query_start_loc", at.query_start_loc, "seq_lens",
                         at.seq_lens, "block_table", at.block_table, "slot_mapping", at.slot_mapping, "q", at.q, "k",
                         at.k, "v", at.v, "out", at.out, "total", at.total);
  });
}

// ---- the decode worker's end

PyObject* decode_new(PyTypeObject*, PyObject* args, PyObject*) {
  return guarded([&]() -> PyObject* {
    unsigned long long memory, epoch;
    PyObject* sizes;
    Shape s;
    if (!PyArg_ParseTuple(args, "KO!K", &memory, &PyTuple_Type, &sizes, &epoch) || !parse_shape(sizes, &s))
      return nullptr;
    return make(std::make_unique<DecodeEnd>(reinterpret_cast<void*>(memory), s, epoch));
  });
}

PyObject* decode_watch(PyObject* self, PyObject* args) {
  int folder, pidfd, shared;
  if (!PyArg_ParseTuple(args, "iip", &folder, &pidfd, &shared)) return nullptr;
  self_of<DecodeEnd>(self).watch({folder, pidfd}, shared != 0);
  return none();
}

PyObject* decode_counters(PyObject* self, PyObject*) {
  const Header& h = self_of<DecodeEnd>(self).header();
  return Py_BuildValue("KKK", static_cast<unsigned long long>(h.rows.load()),
                       static_cast<unsigned long long>(h.layers.load()),
                       static_cast<unsigned long long>(h.busy_ns.load()));
}

PyObject* decode_is_closed(PyObject* self, PyObject*) { return PyBool_FromLong(self_of<DecodeEnd>(self).is_closed()); }

PyObject* decode_is_taken(PyObject* self, PyObject*) { return PyBool_FromLong(self_of<DecodeEnd>(self).is_taken()); }

PyObject* decode_leave(PyObject* self, PyObject*) {
  self_of<DecodeEnd>(self).leave();
  return none();
}

PyMethodDef decode_methods[] = {
    {"watch", decode_watch, METH_VARARGS, "watch($self, folder, pidfd, shared_core, /)\n--\n\n"},
    {"leave", decode_leave, METH_NOARGS, "leave($self, /)\n--\n\n"},
    {"counters", decode_counters, METH_NOARGS, "counters($self, /)\n--\n\n"},
    {"is_closed", decode_is_closed, METH_NOARGS, "is_closed($self, /)\n--\n\n"},
    {"is_taken", decode_is_taken, METH_NOARGS, "is_taken($self, /)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr},
};

// ---- all of the decode worker's ends, as a step sees them

PyObject* steps_new(PyTypeObject*, PyObject* args, PyObject*) {
  long long q_row, kv_row;
  if (!PyArg_ParseTuple(args, "LL", &q_row, &kv_row) || !can_read_tensors()) return nullptr;
  auto steps = std::make_unique<Steps>();
  steps->q_row = q_row;
  steps->kv_row = kv_row;
  return make(std::move(steps));
}

PyObject* steps_begin(PyObject* self, PyObject* args) {
  long long soft_ns, hard_ns;
  if (!PyArg_ParseTuple(args, "LL", &soft_ns, &hard_ns)) return nullptr;
  self_of<Steps>(self).ends.begin(soft_ns, hard_ns);
  return none();
}

PyObject* steps_add(PyObject* self, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *split_object, *channel;
    unsigned int executor;
    if (!PyArg_ParseTuple(args, "O!IO", type_of<Split>, &split_object, &executor, &channel)) return nullptr;
    auto* end = channel == Py_None ? nullptr : get<DecodeEnd>(channel);
    if (PyErr_Occurred() != nullptr) return nullptr;
    Steps& steps = self_of<Steps>(self);
    steps.ends.add(executor, end, self_of<Split>(split_object).remote.at(executor), steps.q_row);
    return none();
  });
}

// The number of a layer. kMaxLayers or more, with a Python error set, for what is none.
uint64_t parse_layer(PyObject* object) {
  const auto layer = PyLong_AsUnsignedLongLong(object);
  if (layer >= kMaxLayers && PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_ValueError, "no layer has this number");
  return layer;
}

PyObject* steps_send(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (!takes(4, count)) return nullptr;
  Steps& steps = self_of<Steps>(self);
  const uint64_t layer = parse_layer(args[0]);
  Rows q, k, v;
  if (layer >= kMaxLayers || !parse_rows(args[1], steps.q_row, &q) || !parse_rows(args[2], steps.kv_row, &k) ||
      !parse_rows(args[3], steps.kv_row, &v))
    return nullptr;
  steps.ends.send(layer, q, k, v);
  return none();
}

// -> executors that failed in this layer, as bits
PyObject* steps_receive(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (!takes(2, count)) return nullptr;
  Steps& steps = self_of<Steps>(self);
  const uint64_t layer = parse_layer(args[0]);
  MutableRows out;
  if (layer >= kMaxLayers || !parse_rows(args[1], steps.q_row, &out)) return nullptr;
  return PyLong_FromUnsignedLongLong(steps.ends.receive(layer, out, [](auto&& sleep) { without_lock(sleep); }));
}

PyObject* steps_times(PyObject* self, PyObject*) {
  const StepTimes& times = self_of<Steps>(self).ends.times();
  return Py_BuildValue("LL", static_cast<long long>(times.local_ns), static_cast<long long>(times.wait_ns));
}

PyMethodDef steps_methods[] = {
    {"begin", steps_begin, METH_VARARGS, "begin($self, soft_ns, hard_ns, /)\n--\n\n"},
    {"add", steps_add, METH_VARARGS, "add($self, split, executor, end, /)\n--\n\n"},
    {"send", cast(steps_send), METH_FASTCALL, "send($self, layer, query, key, value, /)\n--\n\n"},
    {"receive", cast(steps_receive), METH_FASTCALL, "receive($self, layer, output, /)\n--\n\n"},
    {"times_ns", steps_times, METH_NOARGS, "times_ns($self, /)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr},
};

// ---- the executor's end

PyObject* executor_new(PyTypeObject*, PyObject* args, PyObject*) {
  return guarded([&]() -> PyObject* {
    unsigned long long memory, epoch, layers, starts, lens, table, slots;
    long long timeout_ns;
    PyObject* sizes;
    int shared;
    Shape s;
    if (!PyArg_ParseTuple(args, "KO!KKLpKKKK", &memory, &PyTuple_Type, &sizes, &epoch, &layers, &timeout_ns, &shared,
                          &starts, &lens, &table, &slots) ||
        !parse_shape(sizes, &s))
      return nullptr;
    const PlanCopy copy{reinterpret_cast<int32_t*>(starts), reinterpret_cast<int32_t*>(lens),
                        reinterpret_cast<int32_t*>(table), reinterpret_cast<int64_t*>(slots)};
    const Service service{layers, timeout_ns, shared != 0};
    return make(std::make_unique<ExecutorEnd>(reinterpret_cast<void*>(memory), s, epoch, service, copy));
  });
}

// -> (step, rows, padded rows, padded tokens), or None when the end was stopped
PyObject* executor_next_step(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    ExecutorEnd& end = self_of<ExecutorEnd>(self);
    Status status = Status::ready;
    without_lock([&] { status = end.next_plan(); });
    if (status == Status::ended) return none();
    ADRENALINE_CHECK(end.take_plan(), "step plan does not fit its channel");
    return Py_BuildValue("KIII", static_cast<unsigned long long>(end.step()), end.num_rows(), end.padded_rows(),
                         end.padded_tokens());
  });
}

// -> the layer that is to be attended, or None
PyObject* executor_next_layer(PyObject* self, PyObject*) {
  ExecutorEnd& end = self_of<ExecutorEnd>(self);
  const Status status = end.next_layer([](auto&& wait) { without_lock(wait); });
  return status == Status::ready ? PyLong_FromLong(static_cast<long>(end.layer())) : none();
}

PyObject* executor_count_step(PyObject* self, PyObject* busy_ns) {
  const long long ns = PyLong_AsLongLong(busy_ns);
  if (ns == -1 && PyErr_Occurred() != nullptr) return nullptr;
  self_of<ExecutorEnd>(self).count_step(ns);
  return none();
}

PyObject* executor_stop(PyObject* self, PyObject*) {
  self_of<ExecutorEnd>(self).stop();
  return none();
}

PyObject* executor_close(PyObject* self, PyObject*) {
  self_of<ExecutorEnd>(self).close();
  return none();
}

PyMethodDef executor_methods[] = {
    {"next_step", executor_next_step, METH_NOARGS, "next_step($self, /)\n--\n\n"},
    {"next_layer", executor_next_layer, METH_NOARGS, "next_layer($self, /)\n--\n\n"},
    {"count_step", executor_count_step, METH_O, "count_step($self, busy_ns, /)\n--\n\n"},
    {"stop", executor_stop, METH_NOARGS, "stop($self, /)\n--\n\n"},
    {"close", executor_close, METH_NOARGS, "close($self, /)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr},
};

PyMethodDef functions[] = {
    {"layout", layout, METH_VARARGS,
     "layout($module, max_rows, max_tokens, max_blocks, q_row, kv_row, out_row, /)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_channel(PyObject* module) {
  if (add_type<DecodeEnd>(module, ADRENALINE_MODULE ".DecodeEnd", decode_methods, decode_new) != 0) return -1;
  if (add_type<Steps>(module, ADRENALINE_MODULE ".Steps", steps_methods, steps_new) != 0) return -1;
  if (add_type<ExecutorEnd>(module, ADRENALINE_MODULE ".ExecutorEnd", executor_methods, executor_new) != 0) return -1;
  if (PyModule_AddIntConstant(module, "MAX_EPOCH", kMaxEpoch) != 0) return -1;
  return PyModule_AddFunctions(module, functions);
}

}  // namespace adrenaline::bindings
