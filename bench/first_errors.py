# SPDX-License-Identifier: Apache-2.0
"""Where ledger decodes first go wrong: `python bench/first_errors.py --model M --prompts N`.

Decodes training prompts one token a step and compares each commit with the exact distribution of
its cell. The first one that no right answer has is printed: how sure the model was, what could have
stood there, and what was visible around it.
"""

from __future__ import annotations

import argparse

import torch
from task_decode import prompt_ids

from r2dllm_ext.models import load_model
from r2dllm_ext.tasks import get_task


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ledger-base")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    task, model = get_task("ledger"), load_model(args.model, dtype=torch.float32)
    words = task.tokenizer
    prompts = [task.sample(args.seed, i).prompt for i in range(args.prompts)]
    ids = prompt_ids(task, prompts)
    L = task.block_length
    P, rows, keys = ids.shape[1] - task.answer_length, torch.arange(len(ids)), ids != words.pad_id
    wrong = torch.zeros(len(ids), dtype=torch.bool)
    for start in range(P, ids.shape[1], L):
        for step in range(L):
            span = (start, start + L)
            logits = model(ids, attention_mask=keys, logits_positions=span).logits
            logits[..., words.mask_id] = -torch.inf
            confidence, prediction = logits.softmax(-1).max(-1)
            masked = ids[:, slice(*span)] == words.mask_id
            cell = confidence.masked_fill(~masked, -1).argmax(1)
            answers = ids[:, P:]
            known = task.posterior(prompts, answers, answers == words.mask_id, strict=False)
            true = known[rows, start - P + cell]
            chosen = prediction[rows, cell]
            for row in rows[~wrong & (true[rows, chosen] < 1e-6)].tolist():
                wrong[row] = True
                place = start + int(cell[row])
                around = words.decode(ids[row, max(P, place - 8) : place + 9])
                could = [
                    f"{words.vocabulary[i]} {p:.2f}"
                    for p, i in zip(*true[row].topk(3), strict=True)
                    if p > 0.005
                ]
                print(
                    f"block {(start - P) // L}, {step} decided: "
                    f"{words.vocabulary[chosen[row]]} by {confidence[row, cell[row]]:.2f}; right: "
                    f"{', '.join(could)} | {around.replace('<mask>', '_').replace('<end>', '#')}",
                    flush=True,
                )
            ids[rows, start + cell] = chosen
    print(f"{int((~wrong).sum())} of {len(ids)} stayed right")


if __name__ == "__main__":
    main()
