// SPDX-License-Identifier: Apache-2.0
// Argument checks shared by the ops. Each message names op, argument, what it got, what it takes;
// all run before anything is written.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../rules/confidence.h"

namespace r2dllm {

using at::Tensor;

// Whether the CUDA back end takes a tensor. The build that emulates it takes none but the CPU's.
inline bool on_cuda(const Tensor& t) {
#ifdef R2DLLM_EMULATED_CUDA
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim,
                      const char* shape) {
  TORCH_CHECK_VALUE(t.dim() == dim, op, ": ", name, " takes shape ", shape, ", got ", t.sizes());
}

inline void check_shape(const char* op, const char* name, const Tensor& t, at::IntArrayRef sizes,
                        const char* shape) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, op, ": ", name, " takes shape ", shape, " = ", sizes,
                    ", got ", t.sizes());
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, op, ": ", name, " takes dtype ", dtype, ", got ",
                   t.scalar_type());
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like,
                         const char* like_name) {
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name, " takes the device of ", like_name,
                    " (", like.device(), "), got ", t.device());
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.is_contiguous(), op, ": ", name, " takes a contiguous tensor, got strides ",
                    t.strides());
}

// A tensor that the op writes: no two of its elements may share memory, those of an expanded view
// or of overlapping windows. Each dimension has to step over all that the narrower ones reach.
inline void check_writable(const char* op, const char* name, const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride, steps taken
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) > 1) steps.emplace_back(t.stride(i), t.size(i) - 1);
  }
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  for (const auto& [stride, count] : steps) {
    TORCH_CHECK_VALUE(t.numel() == 0 || stride > reach, op, ": ", name,
                      " takes a tensor whose elements do not share memory, got sizes ", t.sizes(),
                      " and strides ", t.strides());
    reach += stride * count;
  }
}

// Dtype, V and its stride; V is the last dimension.
inline void check_logit_layout(const char* op, const Tensor& logits) {
  const auto dtype = logits.scalar_type();
  const bool wide = dtype == at::kDouble && !on_cuda(logits);
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || wide, op,
                   ": logits takes dtype float32, bfloat16 or float16 (float64 on the CPU), got ",
                   dtype);
  const int64_t vocab = logits.size(-1), rows = logits.numel() / std::max<int64_t>(vocab, 1);
  TORCH_CHECK_VALUE(vocab >= 1, op, ": logits takes V >= 1, got shape ", logits.sizes());
  // A thread block takes 4096 columns or more; a launch, 2^31 - 1 blocks.
  TORCH_CHECK_VALUE(!on_cuda(logits) || vocab <= INT32_MAX, op,
                    ": logits takes V < 2^31 on CUDA, got shape ", logits.sizes());
  TORCH_CHECK_VALUE(!on_cuda(logits) || rows <= INT32_MAX / ((vocab + 4095) / 4096), op,
                    ": logits takes rows * ceil(V / 4096) < 2^31 on CUDA, got shape ",
                    logits.sizes());
  TORCH_CHECK_VALUE(vocab == 1 || logits.stride(-1) == 1, op,
                    ": logits takes a last dimension of stride 1, got strides ", logits.strides());
}

inline void check_logits(const char* op, const Tensor& logits) {
  check_dim(op, "logits", logits, 3, "[B, L, V]");
  check_logit_layout(op, logits);
  TORCH_CHECK_VALUE(!logits.requires_grad(), op,
                    ": logits takes a tensor that does not require grad, got requires_grad=True; "
                    "decode under torch.no_grad() or pass logits.detach()");
}

// A tensor [B, L] beside logits or statistics, or none.
inline void check_cells(const char* op, const char* name, const std::optional<Tensor>& cells,
                        at::ScalarType dtype, const Tensor& logits,
                        const char* logits_name = "logits") {
  if (!cells) return;
  check_device(op, name, *cells, logits, logits_name);
  check_dtype(op, name, *cells, dtype);
  check_shape(op, name, *cells, logits.sizes().slice(0, 2), "[B, L]");
}

inline void check_candidates(const char* op, const std::optional<Tensor>& candidates,
                             const Tensor& logits) {
  check_cells(op, "candidates", candidates, at::kBool, logits);
}

// [B, L] probabilities, of a dtype that converts to float32 without loss.
inline void check_confidence(const char* op, const Tensor& confidence) {
  check_dim(op, "confidence", confidence, 2, "[B, L]");
  const auto dtype = confidence.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, op,
                   ": confidence takes dtype float32, bfloat16 or float16, got ", dtype);
}

// [B, L] of a given dtype beside the tensor that sets the shape.
inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like,
                       const char* like_name, at::ScalarType dtype) {
  check_device(op, name, t, like, like_name);
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, like.sizes(), "[B, L]");
}

inline void check_probability(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0.0 && value <= 1.0, op, ": ", name,
                    " takes a probability in [0, 1], got ", value);
}

inline void check_at_least(const char* op, const char* name, int64_t value, int64_t least) {
  TORCH_CHECK_VALUE(value >= least, op, ": ", name, " takes an integer >= ", least, ", got ",
                    value);
}

// A value of an enum, passed as an integer.
template <class Enum>
void check_choice(const char* op, const char* name, int64_t value, Enum count) {
  const auto end = static_cast<int64_t>(count);
  TORCH_CHECK_VALUE(value >= 0 && value < end, op, ": ", name, " takes an integer in [0, ", end - 1,
                    "], got ", value);
}

}  // namespace r2dllm
