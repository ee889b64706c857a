// SPDX-License-Identifier: Apache-2.0
// The Python module `_C`: importing it registers the ops of csrc/ops with torch.ops.r2dllm.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/vocab_kernels.h"
#include "ops/torch_python.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::list compiled, supported;
  for (const auto& set : r2dllm::cpu::instruction_sets()) {
    if (set.kernels != nullptr) compiled.append(set.name);
    if (set.is_supported()) supported.append(set.name);
  }

  py::dict info;
  info["version"] = R2DLLM_VERSION;
  info["torch"] = R2DLLM_TORCH_VERSION;
#ifdef R2DLLM_WITH_CUDA
  info["cuda"] = true;
  info["cuda_architectures"] = py::str(R2DLLM_CUDA_ARCHITECTURES).attr("split")(";");
#else
  info["cuda"] = false;
  info["cuda_architectures"] = py::list();
#endif
  info["cpu_compiled"] = compiled;
  info["cpu_supported"] = supported;
  info["cpu_in_use"] = r2dllm::cpu::instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  r2dllm::add_calls(m.ptr());
}
