// SPDX-License-Identifier: Apache-2.0
// The short way from Python to decode_step and select. torch.ops looks every argument up in the
// schema and boxes it, which costs more than the rest of a step on a small block; this takes the
// arguments as `_step` of ops/decode_step.py has them and calls the dispatcher as C++ does.
#include "torch_python.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>

#include "step_arguments.h"

namespace r2dllm {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

#define R2D_TYPE(type, schema, name, value, takes) , type
using StepOp = Results(const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
                       const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                       const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                       const MaybeTensor&, const MaybeTensor&, const c10::List<MaybeTensor>&,
                       int64_t R2D_STEP_OPTIONS(R2D_TYPE));

const c10::TypedOperatorHandle<StepOp>& step_op(bool writes) {
  const auto find = [](const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<StepOp>();
  };
  static const auto decode_step = find("r2dllm::decode_step"), select = find("r2dllm::select");
  return writes ? decode_step : select;
}

// Takes an argument, or says no: to what torch.ops has to look at.
class Reader {
 public:
  bool understands() const { return understands_; }

  Tensor tensor(PyObject* given) {
    if (!THPVariable_CheckExact(given)) {
      understands_ = false;
      return {};
    }
    return THPVariable_Unpack(given);
  }
  MaybeTensor maybe_tensor(PyObject* given) {
    return given == Py_None ? MaybeTensor() : MaybeTensor(tensor(given));
  }
  template <size_t kCount>
  std::array<MaybeTensor, kCount> tensors(PyObject* tuple) {
    std::array<MaybeTensor, kCount> taken;
    understands_ &= PyTuple_Check(tuple) && PyTuple_GET_SIZE(tuple) == kCount;
    for (size_t i = 0; understands_ && i < kCount; ++i) {
      taken[i] = maybe_tensor(PyTuple_GET_ITEM(tuple, i));
    }
    return taken;
  }
  c10::List<MaybeTensor> list(PyObject* list) {
    c10::List<MaybeTensor> taken;
    understands_ &= PyList_Check(list);
    for (Py_ssize_t i = 0; understands_ && i < PyList_GET_SIZE(list); ++i) {
      taken.push_back(maybe_tensor(PyList_GET_ITEM(list, i)));
    }
    return taken;
  }
  StepArguments options(PyObject* tuple) {
    StepArguments taken{};
    Py_ssize_t next = 0;
#define R2D_COUNT(type, schema, name, value, takes) +1
    understands_ &= PyTuple_Check(tuple) && PyTuple_GET_SIZE(tuple) == R2D_STEP_OPTIONS(R2D_COUNT);
    if (!understands_) return taken;
#define R2D_TAKE(type, schema, name, value, takes) \
  take(PyTuple_GET_ITEM(tuple, next++), taken.name);
    R2D_STEP_OPTIONS(R2D_TAKE)
    return taken;
  }
  int64_t zero_or_one(PyObject* given) {
    int64_t taken = 0;
    take(given, taken);
    understands_ &= taken == 0 || taken == 1;
    return taken;
  }

 private:
  void take(PyObject* given, bool& taken) {
    understands_ &= PyBool_Check(given);
    taken = given == Py_True;
  }
  void take(PyObject* given, int64_t& taken) {
    taken = PyLong_CheckExact(given) ? PyLong_AsLongLong(given) : -1;
    understands_ &= PyLong_CheckExact(given) && !(taken == -1 && PyErr_Occurred());
  }
  void take(PyObject* given, double& taken) {
    understands_ &= PyFloat_Check(given);
    if (understands_) taken = PyFloat_AS_DOUBLE(given);
  }

  bool understands_ = true;
};

// step(writes, logits, tokens, state (6), inputs (4), rows, logits_shift, options) -> a tuple of
// results; None: call torch.ops instead.
PyObject* step(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 8 || at::impl::torch_function_mode_enabled()) Py_RETURN_NONE;
  Reader read;
  const Tensor logits = read.tensor(given[1]), tokens = read.tensor(given[2]);
  const std::array<MaybeTensor, 6> state = read.tensors<6>(given[3]);
  const std::array<MaybeTensor, 4> inputs = read.tensors<4>(given[4]);
  const c10::List<MaybeTensor> rows = read.list(given[5]);
  const int64_t shift = read.zero_or_one(given[6]);
  const StepArguments options = read.options(given[7]);
  if (!read.understands()) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
#define R2D_VALUE(type, schema, name, value, takes) , options.name
  const Results results = [&] {
    pybind11::gil_scoped_release no_gil;
    return step_op(given[0] == Py_True)
        .call(logits, tokens, state[0], state[1], state[2], state[3], state[4], state[5], inputs[0],
              inputs[1], inputs[2], inputs[3], rows, shift R2D_STEP_OPTIONS(R2D_VALUE));
  }();
  PyObject* const tuple = PyTuple_New(5);
  Py_ssize_t next = 0;
  std::apply(
      [&](const auto&... result) {
        (PyTuple_SET_ITEM(tuple, next++, THPVariable_Wrap(result)), ...);
      },
      results);
  return tuple;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {{"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)),
                          METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_calls(PyObject* module) { PyModule_AddFunctions(module, methods); }

}  // namespace r2dllm
