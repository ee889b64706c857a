# SPDX-License-Identifier: Apache-2.0
"""LM evaluation harness: `--model r2dllm`, LLaDA and Dream checkpoints on generation tasks.

    python -m r2dllm_ext.integrations.lm_eval --model r2dllm --tasks gsm8k --batch_size 8 \\
        --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,preset=r2,cache=dual,answers=a.jsonl

is the harness's own command line with one model more. Releases after 0.4.13 will find it by
themselves, by an entry point (their pull request 4013): there it is `lm_eval --model r2dllm ...`.
"""

from __future__ import annotations

import sys
from typing import Any

from .._version import __version__
from ..sft.artefacts import write_json
from ._lm_eval_answers import AnswersFile, summary
from ._lm_eval_command import main, register
from ._lm_eval_decode import batches, decode
from ._lm_eval_model import SessionModel
from ._lm_eval_requests import read_requests, settings_of

__all__ = ["R2DLLM", "main", "register"]


class R2DLLM(SessionModel):
    """The harness's model `r2dllm`: `generate_until` by the rules of a `DecodeConfig`.

    Args (each as `--model_args name=value`):
        pretrained: folder or hub id of a LLaDA or Dream checkpoint, or a bundled model's name.
        preset: "r2" (default), "fast_dllm", "vanilla", "budget" or "entropy"; and any field of
            `DecodeConfig`, `temperature` and `seed` among them.
        cache, block_length, logits_shift, stop_id, dtype, trust_remote_code, ids: as the options of
            `r2dllm generate`, with its defaults. With stop_id=none all blocks are decoded, and the
            answer still ends at the model's end token. `device` ("cpu") and `batch_size` (1) are
            options of the harness too.
        gen_length: most tokens of an answer, for all tasks. Default: what a task asks for
            (`max_gen_toks`), else 256 (bundled models: their task's length). The last block is
            decoded whole and cut.
        answers: file of JSON lines that keeps the answers (default: none). The same command goes on
            where a killed one stopped; `NAME.summary.json` beside it is what the answers cost.

    An answer's text ends before its stop token and before the first text of `until`; special tokens
    are dropped. A task with `do_sample` draws as it says, by a seed of request and batch: only then
    do answers depend on the batch. Forwards, tokens a forward and tokens a second are printed, and
    stand in the harness's results under config.r2dllm.

    Raises:
        ValueError: an argument, a request, or a file of answers that is not of these settings.
        NotImplementedError: tasks that ask for likelihoods (multiple choice, perplexity).

    One process. `R2DLLM(pretrained="ledger-base")` is what `lm_eval.simple_evaluate(model=...)`
    takes.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        batch_size: int | str = 1,
        answers: str | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(pretrained, batch_size, arguments)
        self._settings = settings_of(self._session, self._gen_length)
        self._answers = AnswersFile(answers, self._settings)
        self._costs: dict[str, Any] = {}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        from tqdm import tqdm  # the harness has it

        asked = read_requests(self._session, requests, self._settings, self._gen_length)
        with (
            self._answers.open() as answers,
            tqdm(total=len(asked), disable=disable_tqdm, desc="r2dllm", unit="answer") as bar,
        ):
            todo = [request for request in asked if request.key not in answers.found]
            bar.update(len(asked) - len(todo))
            for batch in batches(self._session, todo, self._batch_size):
                records = decode(self._session, batch)
                answers.add(records)
                for request, record in zip(batch, records, strict=True):
                    self.cache_hook.add_partial("generate_until", request.arguments, record["text"])
                bar.update(len(batch))
            found = [answers.found[request.key] for request in asked]
        self._costs = summary(found)
        self._report()
        return [record["text"] for record in found]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness adds to "config" of its results."""
        size = sum(weight.numel() for weight in self._session.model.parameters())
        dtype = self._settings["dtype"]
        return {"model_num_parameters": size, "model_dtype": dtype, "r2dllm": self._summary()}

    def _summary(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "pretrained": self._session.name,
            "device": str(self._device),
            "batch_size": self._batch_size,
            "settings": self._settings,
            "tasks": self._costs,
        }

    def _report(self) -> None:
        for task, costs in self._costs.items():
            print(
                f"r2dllm: {task}: {costs['answers']} answers of {costs['forwards']} forwards (NFE) "
                f"and {costs['tokens']} tokens: {costs['tokens_per_forward']} tokens a forward, "
                f"{costs['tokens_per_second']} a second"
            )
        if self._answers.path is not None:
            path = self._answers.path
            path = path.with_name(path.name.removesuffix(".jsonl") + ".summary.json")
            write_json(path, self._summary())
            print(f"r2dllm: {path}")


if __name__ == "__main__":
    sys.exit(main())
