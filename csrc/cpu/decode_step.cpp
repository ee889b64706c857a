// SPDX-License-Identifier: Apache-2.0
#include "../ops/decode_step.h"

#include <algorithm>
#include <memory>

#include "row_context.h"
#include "sampling.h"
#include "torch_parallel.h"

namespace r2dllm::cpu {

namespace {

// The pass over V: the argmax of every candidate, and the token to commit by confidence alone.
void judge_logits(const DecodeStepParams& params, const bool* masked, int64_t* top_id,
                  float* top_confidence) {
  const int64_t length = params.logits.length;
  const StepOptions& options = params.options;
  const bool greedy = params.sampling.temperature == 0.0;
  const VocabPass pass(params.logits, masked);
  parallel_for(0, pass.cells(), greedy ? 16 : 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t cell = pass.cell(row);
      if (!is_valid(pass.stats(row))) {
        top_confidence[cell] = params.confidence[cell] = NAN;
        continue;
      }
      int64_t id = top_id[cell] = pass.argmax(row);
      float confidence = top_confidence[cell] = pass.probability(row, id);
      if (!greedy) {
        const int64_t* counters = params.counters + cell / length * kCounters;
        id = draw_token(pass, row, params.sampling,
                        uniform(options.seed, counters, cell % length, Draw::kToken))
                 .column;
        confidence = pass.probability(row, id);
      }
      params.prediction[cell] = id;
      params.confidence[cell] = round_to(confidence, options.rounding);
    }
  });
}

}  // namespace

void decode_step(const DecodeStepParams& params) {
  const int64_t batch = params.logits.batch, length = params.logits.length, cells = batch * length;
  const StepOptions& options = params.options;

  const std::unique_ptr<bool[]> masked(new bool[cells]);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t l = 0; l < length; ++l) {
      const int64_t cell = b * length + l;
      masked[cell] =
          params.candidates != nullptr
              ? params.candidates[cell]
              : params.tokens[b * params.tokens_batch_stride + l * params.tokens_length_stride] ==
                    options.mask_id;
    }
  }

  const std::unique_ptr<int64_t[]> top_id(new int64_t[cells]);
  const std::unique_ptr<float[]> top_confidence(new float[cells]);
  std::fill_n(top_id.get(), cells, int64_t{-1});
  std::fill_n(top_confidence.get(), cells, 0.0f);
  std::fill_n(params.prediction, cells, int64_t{-1});
  std::fill_n(params.confidence, cells, 0.0f);
  if (params.statistics != nullptr) {
    for (int64_t cell = 0; cell < cells; ++cell) {
      if (!masked[cell]) continue;
      const Top top = r2dllm::top_of(params.statistics + cell * kStatistics);
      params.prediction[cell] = top_id[cell] = top.id;
      top_confidence[cell] = top.confidence;
      params.confidence[cell] = round_to(top.confidence, options.rounding);
    }
  } else {
    judge_logits(params, masked.get(), top_id.get(), top_confidence.get());
  }

  const int64_t rows_worth_a_thread = std::max<int64_t>(1, 1024 / std::max<int64_t>(length, 1));
  parallel_for(0, batch, rows_worth_a_thread, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint64_t[]> keys(new uint64_t[length]);
    const std::unique_ptr<uint8_t[]> selected(new uint8_t[length]);
    const std::unique_ptr<int32_t[]> order(new int32_t[length]);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t cell = b * length;
      const StepRow row{.length = length,
                        .top_id = top_id.get() + cell,
                        .top_confidence = top_confidence.get() + cell,
                        .prediction = params.prediction + cell,
                        .confidence = params.confidence + cell,
                        .rule = params.rule + cell,
                        .remaining = params.remaining + b,
                        .tokens = params.written_tokens
                                      ? params.written_tokens + b * params.tokens_batch_stride
                                      : nullptr,
                        .tokens_stride = params.tokens_length_stride,
                        .streaks = params.streaks.from(cell),
                        .counters = params.counters + b * kCounters,
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
