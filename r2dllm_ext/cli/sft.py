# SPDX-License-Identifier: Apache-2.0
"""`r2dllm sft`: fine-tune a model to decode in fewer steps."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options
from .session import Session

if TYPE_CHECKING:
    from ..sft import Prompt, Recipe

_NOTES = """\
Prompts are JSON lines: an object with a text "prompt" or a list of token ids "prompt_ids", and what
else the verifier wants. A verifier is a function of that object and the text of an answer:
right or not, or the share that is right.
OUT holds recipe.json, prompts.jsonl, round-1/, round-2/ ..., each with rollouts/, selected.jsonl,
selection.json, train/ and model/; model/ (of the last round), evaluation/ and evaluation.json.
Killed, the same command goes on. On several processes:
  torchrun --nproc-per-node 2 -m r2dllm_ext sft --out OUT ...
"""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "sft",
        help="fine-tune a model to decode in fewer steps",
        description="Roll out prompts, score how redundant each decode was, fine-tune on the lean "
        "ones, do so again with the model that this makes (--rounds), and compare it with what it "
        "was.",
        epilog=_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_data_options(parser.add_argument_group("prompts and answers"))
    _add_round_options(parser.add_argument_group("rounds"))
    _add_training_options(parser.add_argument_group("training"))
    options.add_model_options(parser)
    options.add_decode_options(parser)
    parser.set_defaults(run=run, preset="fast_dllm")


def _add_data_options(group) -> None:
    from ..sft import Rollout, Selection

    def count(name: str, default: int, help: str) -> None:
        help += " (default: %(default)s)"
        group.add_argument(name, type=options.count, default=default, metavar="N", help=help)

    def add(name: str, help: str, **settings: Any) -> None:
        group.add_argument(name, help=help, **settings)

    add(
        "--prompts",
        "JSON lines (default: prompts of the model's own task)",
        type=Path,
        metavar="FILE",
    )
    add(
        "--eval-prompts",
        "JSON lines for the comparison (default: unseen prompts of that task, or none)",
        type=Path,
        metavar="FILE",
    )
    count("--draw", 1024, "prompts of the task to draw, for all rounds together")
    count("--eval-draw", 128, "and for the comparison")
    add(
        "--verifier", "module:function, or none (default: that of the model's task)", metavar="NAME"
    )
    of_rollout, of_selection = _adder(group, Rollout), _adder(group, Selection)
    of_rollout("samples", int, "answers to a prompt", type=options.count)
    of_rollout("greedy_first", bool, "decode the first of a prompt's samples at temperature 0")
    of_rollout(
        "batch_size", int, "answers decoded together", option="--rollout-batch", type=options.count
    )
    of_selection(
        "order",
        str,
        "what is low in a good answer: total, stability, window, ambiguity, "
        "nfe_per_token, rule_count, length, nfe or random",
    )
    add(
        "--filter",
        "train on correct answers, on the right parts of answers, or on all (default: parts with a "
        "task's verifier, correct with another)",
        choices=("correct", "parts", "none"),
    )
    of_selection("quantile", float, "share of the best answers to train on")
    add(
        "--decoders",
        "presets to compare with (default: fast_dllm r2)",
        choices=options.PRESETS,
        nargs="+",
        default=["fast_dllm", "r2"],
        metavar="NAME",
    )


def _adder(group, owner: type) -> Any:
    """Adds options that are fields of `owner`, by name, with the defaults of the fields."""

    def add(
        name: str, kind: type, help: str, *, option: str | None = None, **settings: Any
    ) -> None:
        default, option = getattr(owner, name), option or f"--{name.replace('_', '-')}"
        if kind is bool:  # argparse says the default by itself
            settings["action"] = argparse.BooleanOptionalAction
        else:
            shown = {"type": options.reader(kind), "metavar": options.NUMBERS[kind][1]}
            settings, help = shown | settings, f"{help} (default: {default})"
        group.add_argument(option, default=default, help=help, **settings)

    return add


def _add_round_options(group) -> None:
    from ..sft import Rounds

    add = _adder(group, Rounds)
    add("number", int, "times that the recipe is gone through", option="--rounds", dest="number")
    add("replay", int, "rounds before whose answers are trained on too")
    add(
        "hard_share", float, "examples that answer prompts of which every sample was wrong, at most"
    )
    add(
        "validation", int, "prompts held back, on which a round must not lose more than --tolerance"
    )
    add("tolerance", float, "share of right answers, one token a step, that a round may lose")
    add(
        "blend",
        float,
        "share of the last round's weights in the result, the others the first model's",
    )


def _add_training_options(group) -> None:
    from ..sft import Training

    add = _adder(group, Training)
    add("steps", int, "updates")
    add("batch_size", int, "examples in an update, over all processes")
    add("learning_rate", float, "highest one")
    add("warmup", int, "updates in which it rises")
    add("weight_decay", float, "of AdamW")
    add("trajectory_share", float, "share of examples in a state of their own decode")
    add("iid_share", float, "share of examples masked over the whole answer")
    add("frontier_share", float, "share of examples whose serial tokens are masked from one on")
    add("near", int, "forwards after which a token of such a state is far; 0 = none is")
    add("far_weight", float, "what far tokens weigh")
    add("ema_decay", float, "of the average of the weights, which is the result; 0 = no average")
    add("ratio", float, "bounds of the masked share", nargs=2)
    add("weighting", str, "of masked tokens: flat or elbo", choices=("flat", "elbo"))
    add("entropy_weight", float, "of the certainty term")
    add("entropy_temperature", float, "its temperature")
    add("lora_rank", int, "of adapters (peft); 0 = train all weights")
    add("lora_alpha", float, "their scale")
    add("complementary", bool, "also train on the complement of each mask")
    add("autocast", bool, "compute in bfloat16")
    group.add_argument(
        "--micro-batch-size",
        type=options.count,
        metavar="N",
        help="examples in one forward (default: all of a process)",
    )
    group.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        default="ddp",
        help="with torchrun: each process holds all weights, or a share (default: %(default)s)",
    )
    group.add_argument(
        "--save-every",
        type=options.count,
        default=100,
        metavar="N",
        help="updates between checkpoints (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    from .. import sft

    with sft.process_group(options.device(args.device)) as device:
        args.device = str(device)
        session = Session(args)
        prompts, evaluate_on = _prompts(args, session)
        recipe = _recipe(args, session)
        verifier = None if recipe.verifier is None else sft.load_verifier(recipe.verifier)
        summary = sft.run(
            recipe,
            prompts,
            args.out,
            decode=session.codec.decode,
            evaluate_on=evaluate_on,
            verifier=verifier,
            task=None if recipe.task is None else session.task,
            device=device,
            dtype=session.model.dtype,
            micro_batch_size=args.micro_batch_size,
            parallel=args.parallel,
            save_every=args.save_every,
            model=session.model,
        )
        if sft.current_ranks().is_first:
            _report(summary, args.out)


def _prompts(args: argparse.Namespace, session: Session) -> tuple[list[Prompt], list[Prompt]]:
    from ..sft import Prompt, read_prompts

    encode = session.codec.encode

    def drawn(split: str, n: int) -> list[Prompt]:
        if session.task is None or args.ids:
            raise ValueError("sft needs --prompts FILE: only models of a task have their own")
        samples = [session.task.sample(session.config.seed, i, split=split) for i in range(n)]
        return [Prompt({"prompt": one.prompt}, encode(one.prompt)) for one in samples]

    if args.prompts is not None:
        prompts = read_prompts(args.prompts, encode)
    else:
        prompts = drawn("train", args.draw)
    if args.eval_prompts is not None:
        return prompts, read_prompts(args.eval_prompts, encode)
    return prompts, drawn("test", args.eval_draw) if args.prompts is None else []


def _recipe(args: argparse.Namespace, session: Session) -> Recipe:
    from ..sft import Recipe, Rollout, Rounds, Selection, Training

    verifier, usual_filter = args.verifier, "correct"
    if verifier is None and session.task is not None and not args.ids:
        verifier = f"r2dllm_ext.tasks.{session.task.name}:verify_record"
        usual_filter = "parts"
    if verifier is None or verifier.lower() == "none":
        verifier, usual_filter = None, "none"

    def of(owner: type, *besides: str) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(owner)} - set(besides)
        return {name: getattr(args, name) for name in names}

    seed, mask_id = session.config.seed, session.config.mask_id
    return Recipe(
        model=args.model,
        rollout=Rollout(
            config=session.config,
            gen_length=session.gen_length,
            block_length=session.block_length,
            cache=session.cache,
            logits_shift=session.logits_shift,
            stop_id=session.stop_id,
            samples=args.samples,
            greedy_first=args.greedy_first,
            batch_size=args.rollout_batch,
            autocast=args.autocast,
        ),
        selection=Selection(
            order=args.order,
            filter=args.filter or usual_filter,
            quantile=args.quantile,
            seed=seed,
        ),
        training=Training(
            ratio=tuple(args.ratio),
            seed=seed,
            **of(Training, "ratio", "seed", "clip_norm", "entropy_gate"),
        ),
        rounds=Rounds(**of(Rounds)),
        decoders={name: options.PRESETS[name](mask_id) for name in args.decoders},
        verifier=verifier,
        task=None if session.task is None or args.ids else session.task.name,
    )


def _report(summary: dict[str, Any], out: Path) -> None:
    for number, one in enumerate(summary["rounds"], start=1):
        selection = one["selection"]
        print(
            f"round {number}: {selection['selected']} of {selection['answers']} answers selected "
            f"({selection['pool']} fit to train on)"
            + (f", and {selection['hard']} hard ones" if selection["hard"] else "")
        )
        for attempt in one["attempts"]:
            if attempt["right"] is not None:
                print(
                    f"  {attempt['model']}: {attempt['right']:.1%} right one token a step, "
                    f"{summary['validation']:.1%} before the first round"
                )
    for name, pair in summary["evaluation"].items():
        for which, result in pair.items():
            right = "" if result["right"] is None else f", {result['right']:.1%} right"
            print(f"{name:>10} {which:<5}  NFE {result['nfe']:.2f}{right}")
    print(f"{out / 'model'}: the fine-tuned model")
