// SPDX-License-Identifier: Apache-2.0
#include "../ops/decode_step.h"

#include <algorithm>
#include <memory>

#include "row_context.h"
#include "sampling.h"
#include "torch_parallel.h"

namespace r2dllm::cpu {

namespace {

template <class T>
std::unique_ptr<T[]> filled(int64_t n, T value) {
  std::unique_ptr<T[]> array(new T[n]);
  std::fill_n(array.get(), n, value);
  return array;
}

// What the pass over V says of each cell that was read.
struct Tops {
  std::unique_ptr<int64_t[]> id;
  std::unique_ptr<float[]> confidence;
};

// The token that confidence alone would commit, and its confidence.
struct Judged {
  int64_t id;
  float confidence;
};

// Of cell i of the pass, a candidate with a prediction, whose argmax is `top`.
Judged judge(const DecodeStepParams& params, const VocabPass& pass, int64_t i, const Judged& top) {
  const int64_t length = params.logits.length, cell = pass.cell(i);
  const int64_t b = cell / length, l = cell % length;
  if (params.proposed != nullptr) {
    if (!in_range(params.rows, b) || params.state.slot(b) < 0) return top;
    const int64_t id = params.proposed[cell];
    const bool is_id = id >= 0 && id < params.logits.vocab;
    return is_id ? Judged{id, pass.probability(i, id)} : Judged{-1, NAN};
  }
  if (!params.may_draw()) return top;
  const RowSampling sampling = params.row_sampling();
  const SamplingOptions options = sampling(b);
  if (!(options.temperature > 0.0)) return top;
  const DrawnToken drawn = draw_token(pass, i, options, sampling.uniform(b, l));
  const bool tempered = params.options.sampled_confidence == SampledConfidence::kTempered;
  return {drawn.column,
          tempered ? static_cast<float>(drawn.tempered) : pass.probability(i, drawn.column)};
}

void judge_logits(const DecodeStepParams& params, const bool* read, const bool* masked,
                  const Tops& top) {
  const VocabPass pass(params.logits, read, 0.0, params.entropy != nullptr);
  const int64_t cells_worth_a_thread = params.may_draw() ? 1 : 16;
  parallel_for(0, pass.cells(), cells_worth_a_thread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t cell = pass.cell(i);
      const bool valid = is_valid(pass.stats(i));
      const int64_t id = valid ? pass.argmax(i) : -1;
      const Judged best{id, valid ? pass.probability(i, id) : NAN};
      const Judged judged = valid && masked[cell] ? judge(params, pass, i, best) : best;
      top.id[cell] = best.id;
      top.confidence[cell] = best.confidence;
      params.prediction[cell] = judged.id;
      params.confidence[cell] = round_to(judged.confidence, params.options.rounding);
      if (params.entropy != nullptr) {
        params.entropy[cell] = static_cast<float>(pass.entropy(i));
      }
    }
  });
}

void judge_statistics(const DecodeStepParams& params, const bool* read, const Tops& top) {
  for (int64_t cell = 0; cell < params.logits.batch * params.logits.length; ++cell) {
    if (!read[cell]) continue;
    const double* statistics = params.statistics + cell * kStatistics;
    const Top found = top_of(statistics);
    params.prediction[cell] = top.id[cell] = found.id;
    top.confidence[cell] = found.confidence;
    params.confidence[cell] = round_to(found.confidence, params.options.rounding);
    if (params.entropy != nullptr) {
      params.entropy[cell] = found.id >= 0 ? static_cast<float>(entropy_of(statistics)) : NAN;
    }
  }
}

}  // namespace

void decode_step(const DecodeStepParams& params) {
  const int64_t batch = params.logits.batch, length = params.logits.length, cells = batch * length;

  const std::unique_ptr<bool[]> masked(new bool[cells]), editable(new bool[cells]),
      read(new bool[cells]);
  for (int64_t b = 0, cell = 0; b < batch; ++b) {
    for (int64_t l = 0; l < length; ++l, ++cell) {
      masked[cell] = params.is_candidate(b, l);
      editable[cell] = params.is_editable(b, l);
      read[cell] = masked[cell] || editable[cell];
    }
  }

  const Tops top{filled<int64_t>(cells, -1), filled(cells, 0.0f)};
  std::fill_n(params.prediction, cells, int64_t{-1});
  std::fill_n(params.confidence, cells, 0.0f);
  if (params.entropy != nullptr) std::fill_n(params.entropy, cells, 0.0f);
  if (params.statistics != nullptr) {
    judge_statistics(params, read.get(), top);
  } else {
    judge_logits(params, read.get(), masked.get(), top);
  }

  const int64_t rows_worth_a_thread = std::max<int64_t>(1, 1024 / std::max<int64_t>(length, 1));
  parallel_for(0, batch, rows_worth_a_thread, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint64_t[]> keys(new uint64_t[length]);
    const std::unique_ptr<uint8_t[]> selected(new uint8_t[length]);
    const std::unique_ptr<int32_t[]> order(new int32_t[length]);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t cell = b * length, slot = params.state.slot(b);
      StepOptions options = params.options;
      const bool valid = params.take_row(b, options);
      const bool has_state = params.state.counters != nullptr && slot >= 0;
      const StepRow row{.length = length,
                        .number = b,
                        .is_valid = valid,
                        .top_id = top.id.get() + cell,
                        .top_confidence = top.confidence.get() + cell,
                        .entropy = params.entropy != nullptr ? params.entropy + cell : nullptr,
                        .prediction = params.prediction + cell,
                        .confidence = params.confidence + cell,
                        .rule = params.rule + cell,
                        .remaining = params.remaining + b,
                        .tokens = params.tokens,
                        .streaks = has_state ? params.state.streaks.from(slot * length) : Streaks{},
                        .counters = has_state ? params.state.counters + slot * kCounters : nullptr,
                        .step_map = has_state && params.state.step_map != nullptr
                                        ? params.state.step_map + slot * length
                                        : nullptr,
                        .editable = params.editable != nullptr ? editable.get() + cell : nullptr,
                        .masked = masked.get() + cell,
                        .keys = keys.get(),
                        .selected = selected.get(),
                        .order = order.get()};
      RowContext context;
      RowStep<RowContext>(context, row, options).run();
    }
  });
}

}  // namespace r2dllm::cpu
