# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from .._checks import choice, integer, is_tensor, number, rule_tensors, tensor
from ..config import TOKEN_CLUSTERS


def positional_ambiguity(
    prediction: torch.Tensor,
    confidence: torch.Tensor,
    is_masked: torch.Tensor,
    *,
    min_confidence: float,
    min_run: int = 2,
    mode: str = "confidence",
    seed: int = 0,
    row: torch.Tensor | None = None,
    step: int = 0,
) -> torch.Tensor:
    """Choose one cell of each run of neighbours that predict the same token.

    A run is a maximal stretch of adjacent masked cells with one prediction. It counts if it is
    at least `min_run` long and its greatest confidence exceeds `min_confidence`.

    Args:
        prediction: [B, L] int64; negative = none, which ends a run.
        confidence: [B, L] float32, float16 or bfloat16; non-finite ends a run.
        is_masked: [B, L] bool, True where no token is committed yet.
        min_confidence: exclusive, a probability in [0, 1].
        min_run: shortest run that counts, >= 1.
        mode: "confidence" (best, leftmost on ties), "mid" (cell len // 2 of the run) or
            "random".
        seed, row, step: what a "random" choice depends on, beside the run's first cell: seed,
            [B] int64 identities of the rows (default 0 .. B - 1), number of the step.

    Returns:
        [B, L] bool, at most one True per run.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes.

    Same bits on every device. No host synchronisation. Source: token cluster of R2-dLLM
    (`token_cluster`, `token_cluster_size`); oracle: `reference.positional_ambiguity`.

    >>> positional_ambiguity(torch.tensor([[7, 7, 4]]), torch.tensor([[.5, .9, .9]]),
    ...                      torch.ones(1, 3, dtype=torch.bool), min_confidence=.8)
    tensor([[False,  True, False]])
    """
    op = "positional_ambiguity"
    is_tensor(op, prediction=prediction, confidence=confidence, is_masked=is_masked)
    is_tensor(op, row=row, optional=True)
    return torch.ops.r2dllm.positional_ambiguity(
        prediction,
        confidence,
        is_masked,
        number(op, "min_confidence", min_confidence),
        integer(op, "min_run", min_run),
        TOKEN_CLUSTERS.index(choice(op, "mode", mode, TOKEN_CLUSTERS[1:])),
        integer(op, "seed", seed),
        row,
        integer(op, "step", step),
    )


@torch.library.register_fake("r2dllm::positional_ambiguity")
def _(
    prediction, confidence, is_masked, min_confidence, min_run=2, mode=1, seed=0, row=None, step=0
):
    op = "positional_ambiguity"
    given = [("prediction", prediction, torch.int64), ("is_masked", is_masked, torch.bool)]
    rule_tensors(op, confidence, given)
    if row is not None:
        tensor(op, "row", row, "[B]", torch.int64, like=("confidence", confidence))
    return prediction.new_empty(prediction.shape, dtype=torch.bool)
