// SPDX-License-Identifier: Apache-2.0
// Which instruction set the pass over V runs on.
#include "vocab_kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace r2dllm::cpu {

std::vector<InstructionSet> instruction_sets() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool runs_avx512 = __builtin_cpu_supports("avx512f") &&
                           __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool runs_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("f16c");
#else
  const bool runs_avx512 = false, runs_avx2 = false;
#endif
  return {{"avx512", avx512_kernels(), runs_avx512},
          {"avx2", avx2_kernels(), runs_avx2},
          {"portable", portable_kernels(), true}};
}

const VocabKernels* choose_kernels(const char* wanted) {
  std::string_view name = wanted == nullptr ? "" : wanted;
  if (name.find_first_not_of(" \t\r\n") == name.npos) name = "";  // blank counts as unset
  std::string here, problem = "there is no such instruction set";
  for (const InstructionSet& set : instruction_sets()) {
    if (set.is_supported() && (name.empty() || name == set.name)) return set.kernels;
    if (set.is_supported()) here += here.empty() ? set.name : std::string(", ") + set.name;
    if (name == set.name) {
      problem = set.kernels == nullptr ? "this build has no kernels for it"
                                       : "this processor does not run it";
    }
  }
  throw std::invalid_argument("r2dllm_ext: R2DLLM_CPU takes one of " + here +
                              " on this machine, got '" + std::string(name) + "': " + problem);
}

namespace {

// A choice that throws is made, and throws, again at the next call: nothing runs on another set.
const VocabKernels* chosen_kernels() {
  static const VocabKernels* const kChosen = choose_kernels(std::getenv("R2DLLM_CPU"));
  return kChosen;
}

}  // namespace

const VocabKernels& vocab_kernels(LogitType type) {
  const VocabKernels* chosen = chosen_kernels();
  return (type == LogitType::kDouble ? portable_kernels() : chosen)[static_cast<int>(type)];
}

const char* instruction_set() { return chosen_kernels()->instruction_set; }

}  // namespace r2dllm::cpu
