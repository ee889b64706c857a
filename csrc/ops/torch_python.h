// SPDX-License-Identifier: Apache-2.0
#pragma once

struct _object;

namespace r2dllm {

// Adds the functions of torch_python.cpp to a Python module.
void add_calls(_object* module);

}  // namespace r2dllm
