# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: their baselines decide as the oracle does, their numbers are what they say."""

import dataclasses
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import STREAKS, roundings, spiked_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from r2dllm_ext import reference
from r2dllm_ext.config import TEMPORAL_EVALS, DecodeConfig
from r2dllm_ext.state import DecodeState

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """Its modules can be imported by their plain names, as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCH))


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


# ---- the baselines ---------------------------------------------------------------------------


def drifting_steps(seed: int, shape: tuple[int, int, int], steps: int, mask_id: int):
    """Logits of a decode: neighbours often agree, predictions stay or change, some are the mask."""
    rows, length, vocab = shape
    g = torch.Generator().manual_seed(seed)

    def chance(p: float) -> torch.Tensor:
        return torch.rand(rows, length, generator=g) < p

    target = torch.randint(vocab, (rows, length), generator=g)
    for i in range(1, length):
        target[:, i] = torch.where(chance(0.5)[:, i], target[:, i - 1], target[:, i])
    for _ in range(steps):
        target = torch.where(chance(0.1), torch.randint(vocab, target.shape, generator=g), target)
        target = torch.where(chance(0.05), mask_id, target)
        p = 0.55 + 0.44 * torch.rand(rows, length, generator=g)
        yield spiked_logits(g, target, p, vocab)


rule_options = st.fixed_dictionaries(
    {
        "threshold": st.sampled_from((0.5, 0.8, 0.9, 1.0)),
        "factor": st.sampled_from((0.1, 0.5, 1.0)),
        "confidence_cluster_size": st.sampled_from((0, 1, 2, 3, 5, 40)),
        "spatial_threshold": st.sampled_from((0.6, 0.8, 0.9)),
        "confidence_cluster_unmasked": st.sampled_from((None, 0, 1, 2)),
        "token_cluster": st.sampled_from((None, "confidence", "mid")),
        "token_cluster_size": st.integers(1, 3),
        "temporal_steps": st.integers(0, 3),
        "temporal_threshold": st.sampled_from((0.6, 0.8)),
        "temporal_eval": st.sampled_from(TEMPORAL_EVALS),
    }
)
seeds = st.integers(0, 2**31)
bases = st.sampled_from(("threshold", "schedule", "factor"))


def check_against_oracle(step, seed: int, base: str, options: dict, schedule: int) -> None:
    shape = (2, 12, 17)
    config = DecodeConfig(
        3, base=base, steps_per_block=schedule, mask_prediction="allow", **options
    )
    tokens = torch.full(shape[:2], config.mask_id)
    tokens[1, ::4] = 5
    state = DecodeState(*shape[:2])
    want_tokens, want = tokens.clone(), DecodeState(*shape[:2])
    open_cells = (tokens == config.mask_id).sum(1).tolist()
    for i, logits in enumerate(drifting_steps(seed, shape, 6, config.mask_id)):
        left = (tokens == config.mask_id).sum(1).tolist()
        quota = [
            min(masked, m // schedule + (i < m % schedule)) if i < schedule else masked
            for m, masked in zip(open_cells, left, strict=True)
        ]
        step(logits, tokens, state, config, quota)
        reference.decode_step(logits, want_tokens, want, config)
        assert torch.equal(tokens, want_tokens), f"step {i}"
        if config.temporal_steps:
            for name in STREAKS:
                got, expected = getattr(state, name), getattr(want, name)
                # Two softmaxes over 17 terms, and sums of up to 6 of them.
                torch.testing.assert_close(got, expected, rtol=roundings(2 * 17 + 6), atol=0)


@settings(max_examples=60)
@given(seed=seeds, base=bases, options=rule_options, schedule=st.integers(1, 6))
def test_authors_way_equals_the_oracle(seed, base, options, schedule):
    from baselines import authors_step

    check_against_oracle(authors_step, seed, base, options, schedule)


@settings(max_examples=60)
@given(seed=seeds, options=rule_options)
def test_vectorised_equals_the_oracle(seed, options):
    from baselines import vectorised_step

    def step(logits, tokens, state, config, quota):
        vectorised_step(logits, tokens, state, config)

    check_against_oracle(step, seed, "threshold", options, 1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(1, 32, 512), (3, 32, 2000), (2, 5, 16), (1, 1, 16)])
def test_all_ways_agree_on_the_measured_block(r2, shape, dtype):
    """Ours, the authors' way and the vectorised one; on a full block every rule fires."""
    from comparisons import decode_step_case
    from shapes import DTYPES, Shape, spiked_block

    case = decode_step_case(spiked_block(Shape(*shape), DTYPES[dtype]), "not wanted")
    assert case.skipped == {"compiled": "not wanted"}
    if shape[1] == 32:
        rules = {"THRESHOLD", "WINDOW", "AMBIGUITY", "STABILITY"}
        assert set(case.rules) == rules | ({"FORCED"} if shape[0] > 1 else set())


def test_a_wrong_baseline_is_noticed(r2, monkeypatch):
    import comparisons
    from shapes import Shape, spiked_block

    monkeypatch.setattr(comparisons, "authors_step", lambda *_: None)
    with pytest.raises(comparisons.Disagreement, match="tokens of authors differ"):
        comparisons.decode_step_case(spiked_block(Shape(1, 32, 64), torch.float32), "")


@pytest.mark.parametrize("op", ["window_pool", "positional_ambiguity", "update_stability"])
def test_rules_alone_agree(r2, op):
    from comparisons import rule_case
    from shapes import Shape

    names = [variant.name for variant in rule_case(op, Shape(3, 32, 0), "cpu").variants]
    assert names == ["ours", "authors", "vectorised"][: 3 - (op == "update_stability")]


# ---- timing and report -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval(successes, n, low, high):
    from report import wilson

    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_a_record_names_what_chose_the_kernels(monkeypatch):
    from report import environment

    monkeypatch.setattr(sys, "argv", ["/any/where/run.py", "--json", "/some/a b.json"])
    monkeypatch.setenv("R2DLLM_CPU", "avx2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "")
    for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.delenv(name, raising=False)
    found = environment("cpu")
    assert found["command"] == "R2DLLM_CPU=avx2 python run.py --json 'a b.json'"
    machine, capability = found["machine"], torch.backends.cpu.get_cpu_capability()
    assert machine["instruction_set_of_torch"] == capability.lower()


def test_wilson_edges():
    from report import wilson

    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(500_000, 1_000_000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25e-6), rel=1e-3)
    with pytest.raises(ValueError, match="got 3"):
        wilson(3, 2)


def test_measure_is_fair():
    """Every call is renewed and preceded by `before`, and no variant is starved."""
    from timing import Variant, measure

    log = []
    variants = [
        Variant(name, lambda name=name: log.append(name), lambda: log.append("renew"))
        for name in ("a", "b")
    ]
    samples = measure(variants, before=lambda: log.append("before"), seconds=0.01)
    assert len(samples["a"]) >= 7 <= len(samples["b"])
    assert log[::3] == ["renew"] * (len(log) // 3)
    assert log[1::3] == ["before"] * (len(log) // 3)
    assert {*log[2::3]} == {"a", "b"}


def test_reads_cover_every_byte():
    """The words that the read-only pass goes over are the whole buffer, whatever its size."""
    from timing import as_words

    for columns in (1, 2, 3, 8):
        for dtype in (torch.bfloat16, torch.float32):
            logits = torch.zeros(1, 3, columns, dtype=dtype)
            assert as_words(logits).nbytes == logits.nbytes


def test_summary_is_exact():
    from timing import summary

    assert summary([1.0, 2.0, 3.0, 4.0, 5.0]) == {
        "median_us": 3.0,
        "q1_us": 2.0,
        "q3_us": 4.0,
        "min_us": 1.0,
        "max_us": 5.0,
        "n": 5,
    }


def record(op, shape, dtype, **rest):
    return {"op": op, "shape": shape._asdict(), "dtype": dtype, **rest}


def verdicts(bars) -> dict[str, bool]:
    """Of the bars that were measured."""
    return {bar["bar"]: bar["passed"] for bar in bars if bar["passed"] is not None}


def test_bars_of_an_instruction_set():
    from bars import bar_table, cpu_bars
    from shapes import NAMED, TINY

    records = [
        record("decode_step", NAMED["llada-1"], "bf16", ratio={"authors": 60.0, "softmax": 9.0}),
        record("decode_step", NAMED["llada-8"], "bf16", extra_peak_bytes={"ours": 2**20}),
        record("overhead", TINY, "fp32", columns={"ours": {"median_us": 20.1}}),
        record("sft_loss", NAMED["llada-8"], "fp32", share=100, ratio={"eager": 9.0}),
        record(
            "sft_loss",
            NAMED["llada-8"],
            "bf16",
            share=50,
            ratio={"eager": 5.0},
            extra_peak_bytes={"ours": 2**20 + 1},
        ),
    ]
    everywhere = {
        "decode_step 8 x 32 x 126464 bf16: extra peak memory, MiB": True,
        "sft_loss 256 x 126464 bf16, half ignored: extra peak memory, MiB": False,
        "overhead of a call, us": False,
    }
    assert verdicts(cpu_bars(records, "portable")) == everywhere
    assert verdicts(cpu_bars(records, "avx512")) == everywhere | {
        "decode_step 1 x 32 x 126464 bf16: times faster than authors": True,
        "decode_step 1 x 32 x 126464 bf16: times faster than softmax": False,
        "sft_loss 256 x 126464 bf16, half ignored: times faster than eager": False,
    }
    assert verdicts(cpu_bars(records, "avx2")) == everywhere | {
        "decode_step 1 x 32 x 126464 bf16: times faster than authors": True,
        "decode_step 1 x 32 x 126464 bf16: times faster than softmax": True,
        "sft_loss 256 x 126464 bf16, half ignored: times faster than eager": True,
    }
    assert bar_table(cpu_bars(records, "avx512")).count("FAIL") == 4
    assert bar_table(cpu_bars([], "avx512")) == ""


def test_a_call_may_cost_six_small_operations():
    from bars import cpu_bars
    from shapes import TINY

    columns = {"ours": {"median_us": 23.9}, "torch_add": {"median_us": 4.0}}
    columns |= {"release": {"median_us": 26.2}, "dream": {"median_us": 26.4}}
    assert verdicts(cpu_bars([record("overhead", TINY, "fp32", columns=columns)], "avx2")) == {
        "overhead of a call, us": True,
        "overhead of a call with the release's options, of the default's": True,
        "overhead of a call with Dream's options, of the default's": False,
    }


def test_recorded_runs_hold_the_bars_of_their_instruction_set():
    from bars import SPEEDS, cpu_bars, find, ratio
    from shapes import NAMED

    runs = [json.loads(path.read_text()) for path in (BENCH / "results").glob("*_cpu_*.json")]
    recorded = {run["machine"]["instruction_set"] for run in runs}
    assert recorded == set(SPEEDS)
    for instruction_set in recorded:
        own = [run for run in runs if run["machine"]["instruction_set"] == instruction_set]
        records = [record for run in own for record in run["records"]]
        assert all(verdicts(cpu_bars(records, instruction_set)).values())
        for (op, rows, dtype, other), speed in SPEEDS[instruction_set].items():
            value = ratio(find(records, op, NAMED[f"llada-{rows}"], dtype), other)
            assert value == pytest.approx(speed.recorded, rel=1e-3) and speed.least < value


def test_bars_of_a_card():
    from bars import cuda_bars
    from shapes import NAMED

    records = [
        record(
            "decode_step",
            NAMED["llada-1"],
            "bf16",
            ratio={"authors": 199.0},
            columns={"ours": {"median_us": 8.0}},
            device_work={"ours": {"launches": 2.0, "host_syncs": 0.0}},
        ),
        record("decode_step", NAMED["llada-8"], "bf16", columns={"ours": {"median_us": 22.5}}),
        record("sft_loss", NAMED["llada-64"], "bf16", share=50, ratio={"read + write": 0.9}),
    ]
    warm, cold = (cuda_bars(records, cache) for cache in ("warm", "cold"))
    assert [bar["passed"] for bar in warm] == [True, True, False, True, True, None, None, None]
    assert [bar["passed"] for bar in cold[3:6]] == [False, None, True]


def test_memory_of_a_known_size(r2):
    """The authors' float64 softmax: two [B, L, V] tensors of 8 bytes; ours: none of size V.

    A third may count where the hole that the first left in the heap does not fit the next one.
    """
    from memory import peak_memory
    from shapes import Shape

    B, L, V = shape = Shape(2, 32, 16384)
    peaks = peak_memory(shape, "bf16", "cpu", 1)
    if isinstance(peaks, str):
        pytest.skip(peaks)
    tensor = B * L * V * 8
    assert 1.9 * tensor <= peaks["authors"] <= 3.1 * tensor
    assert peaks["ours"] < B * L * V


def test_quick_run(r2, tmp_path):
    out = tmp_path / "bench.json"
    done = run(
        "run.py",
        "--quick",
        "--shape",
        "2,32,512",
        "--op",
        "decode_step",
        "--op",
        "overhead",
        "--op",
        "token_confidence",
        "--op",
        "window_pool",
        "--seconds",
        "0.05",
        "--memory",
        "off",
        "--threads",
        "1",
        "--json",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    used = r2.build_info()["cpu_in_use"]
    assert "overhead of a call" in done.stdout and used in done.stdout.split("bars: ")[1]
    content = json.loads(out.read_text())
    assert {"schema", "machine", "versions", "commit", "command", "settings", "bars"} <= set(
        content
    )
    assert str(tmp_path) not in out.read_text()
    assert content["machine"]["threads"] == 1
    ops = ["decode_step", "overhead", "token_confidence", "window_pool"]
    assert [record["op"] for record in content["records"]] == ops
    assert all(record["checked"] for record in content["records"])
    step = content["records"][0]
    assert step["bytes"] == 2 * 32 * 512 * 2
    assert set(step["columns"]) == {"ours", "authors", "vectorised", "softmax", "read"}
    assert step["skipped"] == {"compiled": "--quick"}
    assert step["fraction_of_read"] > 0 and step["gb_per_s"] > 0
    for name, column in step["columns"].items():
        order = [column[key] for key in ("min_us", "q1_us", "median_us", "q3_us", "max_us")]
        assert order == sorted(order) and column["n"] >= 1
        ours = step["columns"]["ours"]["median_us"]
        assert step["ratio"][name] == pytest.approx(column["median_us"] / ours, rel=1e-3)


def test_a_step_with_its_forward(r2, tmp_path):
    out = tmp_path / "forward.json"
    options = ("--small", "--device", "cpu", "--seconds", "0.05", "--no-compile")
    done = run("forward.py", *options, "--json", str(out))
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    shares, columns = content["outside_forward"], content["columns"]
    assert set(columns) == {"forward eager", "ours eager", "authors eager", "read"}
    assert set(shares) == {"ours eager", "authors eager"}
    for name, share in shares.items():
        of_forward = columns["forward eager"]["median_us"] / columns[name]["median_us"]
        assert share == pytest.approx(1 - of_forward, abs=1e-3)
    assert content["skipped"] == {"compiled": "--no-compile"} and content["bars"] == []


# ---- what only a GPU runs --------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_read_kernel_compiles(tmp_path):
    from reading import compile_read

    assert compile_read("90", tmp_path).stat().st_size > 0


def test_the_triton_kernel_is_right_in_triton_s_interpreter():
    pytest.importorskip("triton")
    code = """
import torch
from triton_confidence import triton_confidence
logits = torch.randn(2, 3, 9001, generator=torch.Generator().manual_seed(0)) * 3
logits[0, 0, [17, 4113]] = 20
confidence, prediction = triton_confidence(logits)
want, at = torch.softmax(logits, -1).max(-1)
assert torch.equal(prediction, at)
# 168 roundings: tiles of 4,096 columns at most, each added up as a tree.
assert torch.allclose(confidence, want, rtol=1e-5, atol=0)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCH)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=environment)


def test_other_gpu_packages_are_columns_or_reasons(monkeypatch):
    from gpu_kernels import other_ways

    assert other_ways("cpu") == ({}, {})
    monkeypatch.setattr("gpu_kernels.optional", lambda name: f"{name} is not installed")
    reasons = {name: f"{name} is not installed" for name in ("triton", "flashinfer")}
    assert other_ways("cuda") == ({}, reasons)


# ---- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("run", ("--shape", "1,2"), "--shape takes B,L,V"),
        ("run", ("--shape", "1,2,3"), "V >= 16"),
        ("run", ("--op", "nothing"), "--op"),
        ("run", ("--threads", "0"), "--threads takes"),
        ("run", ("--seconds", "-1"), "--seconds takes"),
        ("curves", ("--task", "ledger", "--model", "no/such/folder/here"), "no folder"),
        ("curves", ("--task", "ledger", "--prompts", "1"), "--prompts takes"),
        ("curves", ("--task", "ledger", "--prompts", "8", "--curve-prompts", "9"), "takes 0 or 2"),
        ("curves", ("--task", "ledger", "--decoders", "fast"), "--decoders takes"),
        ("curves", ("--task", "ledger", "--decoders", "budget=-1"), "error_budget"),
        ("experiment", ("--task", "ledger"), "--out"),
        ("experiment", ("--task", "ledger", "--out", "x", "--steps", "0"), "--steps takes"),
        ("experiment", ("--task", "ledger", "--out", "x", "--prompts", "2"), "--prompts takes"),
    ],
)
def test_errors_are_one_line(r2, monkeypatch, capsys, script, arguments, message):
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(SystemExit) as raised:
        importlib.import_module(script).main(list(arguments))
    assert raised.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"{script}.py: ") and message in stderr and stderr.count("\n") == 1


def test_cuda_is_refused_without_cuda(r2):
    """As a process of its own: nothing but that one line may reach the user."""
    if r2.build_info()["cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = run("run.py", "--device", "cuda")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "--device cuda" in done.stderr


def test_small_steps(r2):
    """What a card is given first; here the CPU is compared with itself."""
    done = run("small_steps.py", "--device", "cpu")
    assert done.returncode == 0 and "cases agree with the CPU" in done.stdout, done.stderr


# ---- the experiment --------------------------------------------------------------------------


def answers(n, *, nfe, right, length=60):
    return [
        {"number": i, "right": int(i < right), "parts": 1, "nfe": nfe(i), "length": length}
        for i in range(n)
    ]


def test_arms_differ_in_selection_and_certainty_alone():
    from experiment import ARMS, parse, recipe_of

    from r2dllm_ext.tasks import get_task

    args = parse(["--task", "ledger", "--out", "x"])
    assert (args.seeds, args.prompts, args.rounds, args.model) == (3, 512, 3, "ledger-base")
    random, lean, certain = (recipe_of(arm, 2, get_task("ledger"), args) for arm in ARMS[1:])
    assert dataclasses.replace(random, selection=lean.selection) == lean
    assert (random.selection.order, lean.selection.order) == ("random", "nfe")
    assert dataclasses.replace(certain, training=lean.training) == lean
    assert certain.training.entropy_weight > 0
    assert lean.training.entropy_weight == 0


def test_value_is_the_quickest_that_loses_a_point_at_most():
    from experiment import chosen_value

    curve = {
        0.001: {"accuracy": 0.96, "nfe": 40.0},
        0.01: {"accuracy": 0.95, "nfe": 30.0},
        0.1: {"accuracy": 0.90, "nfe": 20.0},
    }
    assert chosen_value(curve, 0.96) == 0.01
    assert chosen_value(curve, 0.90) == 0.1
    assert chosen_value(curve, 0.99) == 0.001  # none is good enough


def test_area_under_accuracy_and_tokens_per_forward():
    from experiment_report import area

    curve = {
        1: {"tokens_per_forward": 1.0, "accuracy": 0.9},
        2: {"tokens_per_forward": 2.0, "accuracy": 0.88},
        3: {"tokens_per_forward": 3.0, "accuracy": 0.5},  # more than 5 points below the first
    }
    ends = 90 * 1.0, 88 * math.exp(-3 * (1 - 88 / 90))
    assert area(curve, 90.0) == pytest.approx(1.0 * 90 + sum(ends) / 2, abs=0.06)
    assert area(curve, 100.0) < area(curve, 90.0)


@pytest.mark.parametrize(
    "nfe, right, failed",
    [(7.0, 96, None), (9.0, 96, "interval"), (7.0, 80, "within_base_interval")],
)
def test_the_claim_is_what_was_stated(nfe, right, failed):
    from experiment_report import compare, measured

    records = {
        "lean": answers(100, nfe=lambda i: nfe + i % 3, right=right),
        "random": answers(100, nfe=lambda i: 9.0 + i % 2, right=96),
    }
    results = {
        "base": {"vanilla": {"curve": {1: measured(answers(100, nfe=lambda i: 60, right=97))}}},
        "lean": {"budget": {"chosen": 0.1, "curve": {0.1: measured(records["lean"])}}},
    }
    got = compare(records, results)
    assert got["within_base_interval"] == (failed != "within_base_interval")
    assert (got["forwards"]["interval95"][1] < 0) == (failed != "interval")
    assert got["holds"] == (failed is None)


def test_styles_leave_out_what_the_prompt_decides():
    from experiment import styles

    from r2dllm_ext.tasks import get_task

    task = get_task("ledger")
    encode = task.tokenizer.encode
    one, two, other = (encode(t) for t in ("so 1 9", "so 2 3", "thus 1 9"))
    assert styles([{"token_ids": ids} for ids in (one, two, one)], task) == 1
    assert styles([{"token_ids": ids} for ids in (one, two, other)], task) == 2


def test_redundancy_is_held_against_length_round_by_round(tmp_path):
    from experiment import correlations

    def write(number, pairs, right=True):
        folder = tmp_path / f"round-{number}" / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{len(list(folder.iterdir())):06}.jsonl"
        records = [
            {"score": {"total": x}, "length": n, "complete": True, "correct": right}
            for x, n in pairs
        ]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))

    write(1, [(0.1, 9), (0.5, 20)])
    write(1, [(3.0, 21)])
    write(1, [(9.0, 1)], right=False)  # has no say
    write(2, [(0.5, 20), (3.0, 21), (4.0, 1)])
    write(3, [(0.5, 20), (3.0, 20)])
    assert correlations(tmp_path) == [1.0, -0.5, None]


def test_experiment_runs(r2, tmp_path, monkeypatch, capsys):
    """All of it, tiny; called again it decodes and trains nothing anew."""
    import experiment

    decoders = {n: experiment.DECODERS[n]._replace(others=()) for n in ("vanilla", "budget")}
    monkeypatch.setattr(experiment, "DECODERS", decoders)
    command = ["--task", "ledger", "--out", str(tmp_path), "--quick", "--prompts", "2", "--choice"]
    command += ["2", "--pool", "4", "--steps", "1"]
    experiment.main(command)
    shown = capsys.readouterr().out
    assert "the choice of lean answers helps: " in shown and (tmp_path / "results.png").is_file()
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert list(results) == list(experiment.ARMS)
    # What fills an answer up is no token, and arms share the first round's answers.
    assert results["base"]["vanilla"]["curve"]["1"]["tokens_per_forward"] < 1
    shared = [
        tmp_path / "seed-0" / arm / "round-1/rollouts/000000.jsonl"
        for arm in results
        if arm != "base"
    ]
    assert len({file.stat().st_mtime_ns for file in shared}) == 1
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "evaluation").rglob("*.jsonl")}
    experiment.main(command)
    assert capsys.readouterr().out == shown
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "evaluation").rglob("*.jsonl")}
