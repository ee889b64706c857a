# SPDX-License-Identifier: Apache-2.0
"""The command line: every command, every error, and the picture of a trace."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from r2dllm_ext import DecodeConfig, Rule, generate, load_model
from r2dllm_ext.cli import main, options
from r2dllm_ext.cli.display import Display, marked_lines
from r2dllm_ext.cli.text import pieces
from r2dllm_ext.models import ModelConfig, Transformer, save_model
from r2dllm_ext.rule_looks import RULE_COLORS
from r2dllm_ext.tasks.ledger import Tokenizer, make_sample
from r2dllm_ext.trace_plot import plot_trace

PROMPT = "start with 4 . first add 3 . second take 5 . answer :"
SHORT = "begin at 1 2 . answer :"
FIELDS = {field.name: field for field in dataclasses.fields(DecodeConfig)}
# A value other than the default, valid beside all defaults.
OTHER = {
    "mask_id": 3,
    "base": "budget",
    "threshold": None,
    "compare": ">",
    "quota": 2,
    "factor": 2.0,
    "error_budget": 0.5,
    "entropy_budget": 0.5,
    "last_free": False,
    "steps_per_block": 4,
    "confidence_cluster_size": 5,
    "spatial_threshold": 0.25,
    "confidence_cluster_unmasked": None,
    "neighbour_radius": 4,
    "neighbour_threshold": 0.5,
    "token_cluster": "mid",
    "token_cluster_size": 3,
    "temporal_steps": 0,
    "temporal_threshold": 0.5,
    "temporal_eval": "ave",
    "edit_threshold": 0.5,
    "temperature": 0.5,
    "sampled_confidence": "tempered",
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.5,
    "seed": -11,
    "mask_prediction": "skip",
    "confidence_dtype": "logits",
    "report_entropy": True,
}


def tiny(family: str = "llada", **changes) -> Transformer:
    """A random model that speaks the ledger's vocabulary, if nothing is changed."""
    words = Tokenizer()
    shape = {
        "vocab_size": len(words),
        "width": 32,
        "layers": 1,
        "heads": 2,
        "mlp_width": 32,
        "mask_id": words.mask_id,
        "eos_id": words.end_id,
        "pad_id": words.pad_id,
    }
    return Transformer(ModelConfig(family, **{**shape, **changes})).init_weights(5, std=0.4)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory) -> str:
    """A checkpoint with the vocabulary of the ledger task."""
    folder = tmp_path_factory.mktemp("ledger")
    save_model(tiny(), folder)
    return str(folder)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> str:
    """A checkpoint in Dream's layout with a vocabulary of its own, without a tokenizer."""
    folder = tmp_path_factory.mktemp("foreign")
    save_model(tiny("dream", vocab_size=40, qkv_bias=True, mask_id=39, eos_id=None), folder)
    return str(folder)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


def fails(result: SimpleNamespace, *words: str) -> None:
    """Status 2, nothing on stdout, one line on stderr that says these words."""
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("r2dllm: error: ") and result.err.count("\n") == 1
    for word in words:
        assert word in result.err


def json_lines(result: SimpleNamespace) -> list[dict]:
    assert (result.status, result.err) == (0, "")
    return [json.loads(line) for line in result.out.splitlines()]


# generate


def test_json_agrees_with_generate(run, ledger):
    (answer,) = json_lines(
        run("generate", PROMPT, "--model", ledger, "--json", "--stop-id", "none")
    )
    words, model = Tokenizer(), load_model(ledger)
    ids = torch.tensor([words.encode(PROMPT)])
    config = DecodeConfig.r2(words.mask_id)
    expected = generate(model, ids, gen_length=96, config=config, trace=True)
    tokens = expected.sequences[0, ids.shape[1] :].tolist()
    rules = [Rule(value).name.lower() for value in expected.trace.commit_rule[0].tolist()]
    counts = {rule.name.lower(): n for rule, n in expected.trace.rule_counts().items()}
    assert answer == {
        "prompt": PROMPT,
        "prompt_ids": ids[0].tolist(),
        "text": words.decode(tokens),
        "token_ids": tokens,
        "length": 96,
        "nfe": expected.nfe,
        "rule": rules,
        "rule_counts": counts,
        "correct": False,
        "config": dataclasses.asdict(config),
    }


def test_batches_of_different_lengths_equal_single_prompts(run, ledger):
    options = ["--model", ledger, "--json", "--gen-length", 32]
    together = json_lines(run("generate", PROMPT, SHORT, "to the end", *options))
    alone = [json_lines(run("generate", p, *options))[0] for p in (PROMPT, SHORT, "to the end")]
    one_by_one = json_lines(
        run("generate", PROMPT, SHORT, "to the end", *options, "--batch-size", 1)
    )
    assert together == alone == one_by_one
    assert [answer["correct"] for answer in together] == [False, None, None]


def test_text_ends_at_the_stop_token(run, ledger):
    options = ["generate", PROMPT, "--model", ledger, "--gen-length", 32, "--json"]
    (free,) = json_lines(run(*options, "--stop-id", "none", "--preset", "vanilla"))
    stop = free["token_ids"][7]
    (stopped,) = json_lines(run(*options, "--stop-id", stop, "--preset", "vanilla"))
    end = stopped["token_ids"].index(stop)
    assert stopped["length"] == end + 1 and len(stopped["token_ids"]) == 32
    assert stopped["text"] == Tokenizer().decode(stopped["token_ids"][:end])
    assert stopped["nfe"] <= free["nfe"] == 32
    assert len(stopped["rule"]) == 32 and sum(stopped["rule_counts"].values()) <= 32


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_caches(run, ledger, cache):
    (answer,) = json_lines(
        run("generate", SHORT, "--model", ledger, "--cache", cache, "--json", "--block-length", 16)
    )
    assert len(answer["token_ids"]) == 96 and Tokenizer().mask_id not in answer["token_ids"]


def test_prompts_come_from_argument_file_and_stdin(run, ledger, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("first\n\n  \nsecond\n", encoding="utf-8")
    options = ["--model", ledger, "--json", "--gen-length", 32]
    monkeypatch.setattr("sys.stdin", io.StringIO("third\nfourth\n"))
    answers = json_lines(run("generate", "begin", "-", "--file", file, *options))
    assert [a["prompt"] for a in answers] == ["begin", "third", "fourth", "first", "second"]
    monkeypatch.setattr("sys.stdin", io.StringIO("third\n"))
    (answer,) = json_lines(run("generate", "--file", "-", *options))
    assert answer["prompt"] == "third"


def test_plain_output_marks_the_rules(run, ledger):
    result = run("generate", PROMPT, "--model", ledger, "--gen-length", 32)
    assert (result.status, result.err) == (0, "") and "\x1b" not in result.out
    lines = result.out.splitlines()
    legend, lines = lines[: len(RULE_COLORS)], lines[len(RULE_COLORS) :]
    assert [line.split()[1] for line in legend] == [r.name.lower() for r in RULE_COLORS]
    assert lines[:2] == ["", f"> {PROMPT}"]
    (answer,) = json_lines(run("generate", PROMPT, "--model", ledger, "--gen-length", 32, "--json"))
    assert " ".join(lines[2:-1:2]) == answer["text"]
    marks = "".join(lines[3:-1:2]).split()
    mark = {"threshold": ".", "forced": "!", "window": "=", "ambiguity": "&", "stability": "~"}
    rules = answer["rule"][: len(answer["text"].split())]
    assert "".join(marks) == "".join((mark | {"base": "+"})[rule] for rule in rules)
    assert lines[-1].startswith(f"NFE {answer['nfe']}, {answer['length']} tokens, ")
    assert "wrong in sentence 1: " in lines[-1]


@pytest.mark.parametrize(
    "environment, code",
    [
        ({"COLORTERM": "truecolor"}, "38;2;59;130;196"),
        ({}, "94"),
    ],
)
def test_colours(run, monkeypatch, capsys, environment, code):
    answer = SimpleNamespace(
        prompt=SimpleNamespace(text="p"),
        pieces=["one", " two"],
        rules=[Rule.THRESHOLD, Rule.NONE],
        nfe=1,
        length=2,
        tokens_per_forward=2.0,
        verdict=None,
    )
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm", "COLORTERM": "", **environment}
    for name, value in terminal.items():
        monkeypatch.setenv(name, value)
    Display().answer(answer)
    assert f"\x1b[{code}mone\x1b[0m two\n" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    Display().answer(answer)
    assert "\none two\n.\n" in capsys.readouterr().out


def test_marked_lines():
    tokens = [
        ("ab", Rule.THRESHOLD),
        (" c", Rule.FORCED),
        ("d\n", Rule.WINDOW),
        ("\n  e", Rule.AMBIGUITY),
        (" long", Rule.STABILITY),
        ("", Rule.NONE),
    ]
    assert marked_lines(tokens, 6) == ["ab cd", ".  !=", "", "  e", "  &", "long", "~"]
    assert marked_lines([("宽", Rule.FORCED), ("x", Rule.THRESHOLD)], 9) == ["宽x", "! ."]
    assert marked_lines([], 9) == [""]


def test_pieces_of_incomplete_characters():
    codec = SimpleNamespace(decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    assert pieces(codec, list("aé.".encode())) == ["a", "", "é", "."]
    assert pieces(codec, list("é".encode())[:1]) == ["\N{REPLACEMENT CHARACTER}"]


def test_ids_need_no_tokenizer(run, foreign):
    (answer,) = json_lines(
        run("generate", "1,2 3", "--ids", "--model", foreign, "--gen-length", 32, "--json")
    )
    assert answer["prompt_ids"] == [1, 2, 3] and answer["correct"] is None
    assert answer["text"] == " ".join(map(str, answer["token_ids"]))
    assert answer["length"] == 32 and answer["config"]["mask_id"] == 39


def test_dream_family_shifts_its_logits(run, foreign):
    options = ["generate", "1 2 3", "--ids", "--model", foreign, "--gen-length", 32, "--json"]
    default, shifted, straight = (
        json_lines(run(*options, *extra))[0]["token_ids"]
        for extra in ([], ["--logits-shift", 1], ["--logits-shift", 0])
    )
    assert default == shifted != straight


def test_pretrained_tokenizer(run, foreign, monkeypatch):
    asked = []

    class Fake:
        bos_token = "b"

        @classmethod
        def from_pretrained(cls, name, trust_remote_code):
            asked.append((name, trust_remote_code))
            return cls()

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [ord(c) - ord("a") for c in text]}

        def apply_chat_template(self, messages, tokenize, **options):
            assert options == {"add_generation_prompt": True, "continue_final_message": False}
            assert not tokenize and messages[0]["role"] == "user"
            return f"x{messages[0]['content']}y"

        def decode(self, ids, skip_special_tokens):
            assert not skip_special_tokens
            return "".join(chr(ord("a") + i) for i in ids)

    module = ModuleType("transformers")
    module.AutoTokenizer = Fake
    monkeypatch.setitem(sys.modules, "transformers", module)
    options = ["--model", foreign, "--gen-length", 32, "--json"]
    plain, begun = json_lines(run("generate", "cd", "bcd", *options))  # one begins as it should
    (chat,) = json_lines(run("generate", "bc", *options, "--chat", "--trust-remote-code"))
    assert asked == [(foreign, False), (foreign, True)]
    assert plain["prompt_ids"] == begun["prompt_ids"] == [1, 2, 3]
    assert chat["prompt_ids"] == [23, 1, 2, 24]
    assert len(plain["text"]) == 32 and plain["correct"] is None


def test_dtype_reaches_the_model(run, ledger, monkeypatch):
    from r2dllm_ext.cli import session

    seen = []
    monkeypatch.setattr(
        session, "load_model", lambda *a, **k: seen.append(k) or load_model(*a, **k)
    )
    json_lines(run("generate", SHORT, "--model", ledger, "--dtype", "bfloat16", "--json"))
    assert seen == [{"device": torch.device("cpu"), "dtype": torch.bfloat16}]


def test_progress_is_on_stderr(run, ledger):
    result = run("generate", SHORT, "--model", ledger, "--json", "--progress")
    assert result.status == 0 and "generate: 100%" in result.err and json.loads(result.out)


# DecodeConfig as options


def parsed(*arguments: str) -> DecodeConfig:
    parser = argparse.ArgumentParser(exit_on_error=False)
    options.add_decode_options(parser)
    return options.decode_config(parser.parse_args(arguments))


def option(name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, "none" if value is None else str(value)]


def test_every_field_is_known_here():
    assert OTHER.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_round_trips(name):
    assert parsed(*option(name, OTHER[name])) == DecodeConfig.r2(0).replace(**{name: OTHER[name]})


@pytest.mark.parametrize("preset", options.PRESETS)
def test_presets_and_all_fields_together(preset):
    assert parsed("--preset", preset) == getattr(DecodeConfig, preset)(0)
    everything = [word for name, value in OTHER.items() for word in option(name, value)]
    assert parsed("--preset", preset, *everything) == DecodeConfig(**OTHER)


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if "None" in str(f.type)])
def test_none_where_a_field_takes_it(name):
    assert getattr(parsed(*option(name, None)), name) is None


def test_help_tells_fields_and_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert option(name, True)[0] in text
        shown = "the model's" if field.default is dataclasses.MISSING else field.default
        assert f"(default: {'none' if shown is None else shown})" in text
    assert "shortest run that counts, >= 1 (release: 2) (default: 2)" in text


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["demo", "-h"], ["trace", "-h"]])
def test_help_and_version(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0 and "r2dllm" in capsys.readouterr().out


# demo


def test_demo(run, ledger):
    options = ["--model", ledger, "--prompts", 2, "--decoders", "vanilla", "r2", "r2"]
    result = run("demo", *options)
    assert (result.status, result.err) == (0, "")
    assert result.out.count(", r2: NFE ") == 1 == result.out.count("\n> ")
    table = [line.split() for line in result.out[result.out.index("2 prompts") :].splitlines()]
    names = ["model", "decoder", "NFE", "right", "tokens", "/", "forward", "seconds"]
    assert table[2] == names
    rows = {row[1]: row for row in table if row[:1] == [Path(ledger).name]}
    assert rows["vanilla"][2:6] == ["96.0", "0", "of", "2"]
    assert 1 <= float(rows["r2"][2]) <= 96 and len(table) == 7


def test_demo_shows_other_prompts_for_another_seed(run, ledger):
    arguments = ["demo", "--model", ledger, "--prompts", 1, "--decoders", "fast_dllm", "--seed", 1]
    result = run(*arguments)
    assert f"> {make_sample(1, 0, split='test').prompt}\n" in result.out


def test_bundled_models_answer(run):
    """One row per decoder and model, on prompts of both tasks."""
    result = run("demo", "--decoders", "fast_dllm", "budget")
    assert result.status == 0 and ", correct\n" in result.out
    rows = [line.split()[:2] for line in result.out.splitlines() if "of" in line.split()]
    models = ("ledger-base", "ledger", "pronounce")
    assert [row for row in rows if row[0] in models] == [
        [model, decoder] for model in models for decoder in ("fast_dllm", "budget")
    ]


# trace


def picture(path) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(np.uint8)


def test_trace_draws_a_picture(run, ledger, tmp_path):
    out = tmp_path / "trace.png"
    options = ["--dpi", 60, "--threshold", 0.3, "--gen-length", 32]
    result = run("trace", "--model", ledger, "--out", out, *options)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(f"{out}: r2: NFE ") and "wrong in sentence" in result.out
    pixels = picture(out)
    assert pixels.shape[0] > 200 and pixels.shape[1] > 600
    colours = {tuple(pixel) for pixel in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}
    assert len(colours) > 100
    for rule in (Rule.THRESHOLD, Rule.FORCED):
        color = RULE_COLORS[rule]
        assert tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) in colours


def test_neighbours_and_edits_are_shown(run, ledger, tmp_path):
    """`--edit-threshold` lets decided cells change; both rules have a mark and a colour."""
    rules = ["--preset", "fast_dllm", "--threshold", 0.2, "--edit-threshold", 0.3]
    rules += ["--neighbour-radius", 2, "--neighbour-threshold", 0.05, "--gen-length", 64]
    (answer,) = json_lines(run("generate", PROMPT, "--model", ledger, *rules, "--json"))
    counts = answer["rule_counts"]
    assert counts["neighbour"] > 1 and counts["edit"] > 1
    plain = run("generate", PROMPT, "--model", ledger, *rules).out
    marks = "".join("".join(plain.splitlines()[len(RULE_COLORS) + 3 : -1 : 2]).split())
    shown = answer["rule"][: len(answer["text"].split())]
    assert [mark in marks for mark in "-*"] == [rule in shown for rule in ("neighbour", "edit")]
    out = tmp_path / "trace.png"
    assert run("trace", PROMPT, "--model", ledger, *rules, "--out", out, "--dpi", 60).status == 0
    colours = {tuple(pixel) for pixel in picture(out).reshape(-1, 3).tolist()}
    for rule in (Rule.NEIGHBOUR, Rule.EDIT):
        assert tuple(int(RULE_COLORS[rule][i : i + 2], 16) for i in (1, 3, 5)) in colours


def test_trace_of_ids_as_svg(run, foreign, tmp_path):
    out = tmp_path / "trace.svg"
    lengths = ["--gen-length", 8, "--block-length", 4, "--cache", "dual"]
    result = run("trace", "1 2 3", "--ids", "--model", foreign, "--out", out, *lengths)
    assert result.status == 0 and out.read_text().lstrip().startswith("<?xml")


def random_trace(batch: int = 2, **options):
    model, words = tiny(), Tokenizer()
    prompt = torch.tensor([words.encode("to the")] * batch)
    prompt[-1] = torch.tensor(words.encode("well then"))
    config = DecodeConfig.r2(words.mask_id, threshold=0.6)
    return generate(
        model, prompt, gen_length=32, block_length=16, config=config, trace=True, **options
    ).trace


def test_plot_of_each_row():
    trace = random_trace(cache="dual", stop_id=1)
    for row in range(2):
        figure = plot_trace(trace, row=row, labels=["$x^2$ & <long word>\n"] * 32, title="a\nb $c")
        figure.canvas.draw()
        main_axes, side = figure.axes[:2]
        forwards = int(trace.row_nfe()[row])
        assert main_axes.get_ylim() == (forwards - 0.5, -0.5) == side.get_ylim()
        assert main_axes.get_xlim() == (-0.5, 31.5)
        committed = sum(bar.get_width() for bars in side.containers for bar in bars)
        assert committed == (trace.commit_step[row] >= 0).sum()
        assert [text.get_text() for text in figure.texts[:2]] == ["a", "b $c"]


def test_plot_without_labels_leaves_pyplot_alone():
    before = set(sys.modules)
    figure = plot_trace(random_trace(1))
    assert "forwards for 32 tokens" in figure.texts[0].get_text()
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_plot_refuses_what_does_not_fit():
    trace = random_trace()
    with pytest.raises(ValueError, match=r"row takes 0\.\.1, got 2"):
        plot_trace(trace, row=2)
    with pytest.raises(ValueError, match="labels takes 32 texts, got 1"):
        plot_trace(trace, labels=["a"])
    empty = generate(
        tiny(), torch.tensor([[4]]), gen_length=0, config=DecodeConfig(2), trace=True
    ).trace
    with pytest.raises(ValueError, match="no step of this row"):
        plot_trace(empty)


# errors


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["COMMAND"]),
        (["fly"], ["invalid choice: 'fly'", "demo"]),
        (["generate", "--bogus"], ["unrecognized arguments: --bogus"]),
        (["generate", "x", "--cache", "big"], ["--cache", "'big'", "dual"]),
        (
            ["generate", "x", "--threshold", "high"],
            ["--threshold", "takes none or a number, got 'high'"],
        ),
        (["generate", "x", "--top-k", "1.5"], ["--top-k", "takes none or an integer, got '1.5'"]),
        (
            ["generate", "x", "--threshold", "2"],
            ["DecodeConfig", "threshold", "takes a number", "2.0"],
        ),
        (["generate", "x", "--base", "best"], ["DecodeConfig", "base", "'best'", "threshold"]),
        (
            ["generate", "x", "--gen-length", "0"],
            ["--gen-length", "takes an integer >= 1, got '0'"],
        ),
        (["generate"], ["no prompt", "--file"]),
        (["generate", " "], ["no prompt"]),
        (["generate", "--file", "no-such-file"], ["no-such-file: No such file or directory"]),
        (["generate", "x", "--model", "no such folder"], ["load_model", "'no such folder'"]),
        (["generate", "x", "--device", "gpu9"], ["--device takes cpu, cuda or cuda:N, got 'gpu9'"]),
        (["trace", "--out", "trace.docx"], ["--out takes", ".png", "'trace.docx'"]),
        (["trace", "--out", "no/such/folder/t.png"], ["no folder 'no/such/folder'"]),
        (["demo", "--decoders", "quick"], ["'quick'", "vanilla"]),
        (["demo", "--prompts", "-1"], ["--prompts", "takes an integer >= 1, got '-1'"]),
    ],
)
def test_errors_are_one_line(run, arguments, words):
    fails(run(*arguments), *words)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate", "first bird"], ["unknown word 'bird' at word 1"]),
        (["generate", "17"], ["write numbers digit by digit"]),
        (["generate", "x", "--ids"], ["--ids: a prompt takes token ids, got 'x'"]),
        (["generate", "99", "--ids"], ["token id 99, the model takes 0..55"]),
        (["generate", "first", "--gen-length", "40"], ["multiple of block_length (32), got 40"]),
        (["generate", "first", "--mask-id", "56"], ["mask_id", "56"]),
        (["trace", "--ids"], ["trace needs a PROMPT"]),
    ],
)
def test_errors_of_a_loaded_model(run, ledger, arguments, words):
    fails(run(*arguments, "--model", ledger), *words)


def test_demo_and_trace_want_a_ledger_model(run, foreign):
    fails(run("demo", "--model", foreign), "demo takes a model of a bundled task")
    fails(run("trace", "--model", foreign, "--ids"), "trace needs a PROMPT")


def test_no_mask_id_anywhere(run, tmp_path):
    save_model(tiny(mask_id=None), tmp_path)
    arguments = ["generate", "5", "--ids", "--model", tmp_path, "--gen-length", 32, "--json"]
    fails(run(*arguments), "names no mask_token_id: give --mask-id")
    assert json_lines(run(*arguments, "--mask-id", 2))[0]["config"]["mask_id"] == 2


def test_broken_weights(run, ledger, tmp_path):
    (tmp_path / "config.json").write_bytes(open(f"{ledger}/config.json", "rb").read())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"not a tensor")
    fails(run("generate", "first", "--model", tmp_path), f"{weights} is not a safetensors file")


def test_a_stuck_decode(run, tmp_path):
    model = tiny()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    save_model(model, tmp_path)
    fails(run("generate", "first", "--model", tmp_path, "--json"), "no progress at step 1, row 0")


@pytest.mark.parametrize(
    "package, arguments, extra",
    [
        ("rich", ["generate", "x"], "cli"),
        ("rich", ["demo"], "cli"),
        ("matplotlib.figure", ["trace"], "plot"),
        ("safetensors", ["generate", "x", "--json"], "models"),
    ],
)
def test_missing_packages_are_named(run, monkeypatch, package, arguments, extra):
    for name in [name for name in sys.modules if name.split(".")[0] == package.split(".")[0]]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("r2dllm_ext.cli.display", "r2dllm_ext.trace_plot"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    fails(run(*arguments), f"pip install 'r2dllm_ext[{extra}]'")


def test_missing_transformers(run, foreign, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    fails(run("generate", "x", "--model", foreign), "needs transformers: pip install", "--ids")


def test_json_needs_no_rich(run, ledger, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delitem(sys.modules, "r2dllm_ext.cli.display", raising=False)
    assert json_lines(run("generate", SHORT, "--model", ledger, "--json"))


def test_traceback_on_demand():
    with pytest.raises(ValueError, match="no prompt"):
        main(["generate", "--traceback"])


def test_interrupted(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("r2dllm_ext.cli.generate.read_prompts", interrupt)
    assert run("generate", "x").status == 130


# as a process


def shell(command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "arguments", ["generate 5 --ids --gen-length 1 --block-length 1", "engines"]
)
def test_a_reader_that_never_was(ledger, arguments):
    """Also where rich writes, which would leave with status 1."""
    model = f"--model '{ledger}'" if arguments.startswith("generate") else ""
    command = f"sleep 0.1; exec '{sys.executable}' -m r2dllm_ext {arguments} {model}"
    result = shell(f"({command}) | true; exit ${{PIPESTATUS[0]}}")
    assert (result.returncode, result.stderr) == (141, "")


def test_as_a_module_whose_reader_leaves(ledger):
    prompts = "for i in {1..150}; do echo 5; done"
    module = f"'{sys.executable}' -m r2dllm_ext"
    options = f"--model '{ledger}' --json --ids --gen-length 1 --block-length 1"
    result = shell(f"set -o pipefail; {prompts} | {module} generate - {options} | head -1")
    assert (result.returncode, result.stderr) == (141, "")
    assert json.loads(result.stdout)["prompt"] == "5"


def test_a_pronounce_model_reads_words(run, tmp_path):
    """Any model with a task's vocabulary speaks it: prompt, length of the answer and verdict."""
    from r2dllm_ext.tasks.pronounce import Tokenizer as Phonemes

    words = Phonemes()
    shape = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16}
    ids = {"mask_id": words.mask_id, "eos_id": words.end_id, "pad_id": words.pad_id}
    config = ModelConfig("llada", len(words), **shape, **ids)
    save_model(Transformer(config).init_weights(0), tmp_path)
    (answer,) = json_lines(run("generate", "Cat dog", "--model", tmp_path, "--json"))
    assert words.decode(answer["prompt_ids"]) == "1 c a t 2 d o g"
    assert len(answer["token_ids"]) == 64 and answer["correct"] is False
    # In one block, as the task says.
    options = ("--preset", "vanilla", "--quota", 64, "--stop-id", "none", "--json")
    short = ("--block-length", 32)
    assert json_lines(run("generate", "cat", "--model", tmp_path, *options))[0]["nfe"] == 1
    assert json_lines(run("generate", "cat", "--model", tmp_path, *options, *short))[0]["nfe"] == 2
    result = run("generate", "cat dog", "--model", tmp_path)
    assert "wrong in word 1: " in result.out
    fails(run("generate", "don't", "--model", tmp_path), "takes letters a to z alone")
    unknown = json_lines(run("generate", "xqzzt", "--model", tmp_path, "--json"))
    assert unknown[0]["correct"] is None
