# SPDX-License-Identifier: Apache-2.0
"""`bench/engines.py`: what it compares is checked first, what is not installed has a reason."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import fast_dllm_oracle
import pytest
import torch
from test_rules_of_engines import MASK, planted, tokens_of

BENCH = Path(__file__).parent.parent / "bench"
PASS = "fast_dllm get_transfer_index"
STEPS = {
    PASS: None,
    "diffusers LLaDA2Pipeline": "diffusers",
    "sglang LowConfidence": "sglang",
    "sglang JointThreshold": "sglang",
    "lmdeploy UnmaskingProcessor": "lmdeploy",
}


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """Its modules can be imported by their plain names, as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.parametrize("step", STEPS)
def test_both_ways_decode_alike(r2, step):
    """Blocks are decided in several steps, among them one that commits many."""
    import engine_cases
    from shapes import Shape

    if reason := engine_cases.missing(step):
        pytest.skip(reason)
    case = engine_cases.engine_case(step, Shape(2, 32, 900), torch.float32, "cpu")
    loops = step not in (PASS, "lmdeploy UnmaskingProcessor")
    assert 8 <= case.forwards < 32 if loops else case.forwards == 1
    assert [variant.turns for variant in case.variants] == [case.forwards] * 2


def test_the_restated_pass_is_fast_dllm_s():
    from baselines import authors_transfer_index

    for seed in range(60):
        shape = ((1, 40), (3, 16), (2, 7))[seed % 3]
        x, dtype = tokens_of(seed, shape), (torch.float32, torch.bfloat16)[seed % 2]
        z = planted(seed, shape, dtype, ties=False)
        x[:, 0] = MASK
        given = z, 0.0, "low_confidence", x == MASK, x, None, (0.9, 0.5)[seed % 2]
        got, want = authors_transfer_index(*given), fast_dllm_oracle.get_transfer_index(*given)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True)), seed


def test_a_checkout_is_looked_for_where_one_is_named(tmp_path, monkeypatch):
    from engine_cases import their_generate

    file = tmp_path / "Fast-dLLM" / "llada" / "generate.py"
    file.parent.mkdir(parents=True)
    file.write_text("from model.modeling_llada import LLaDAModelLM\nname = __name__\n")
    monkeypatch.chdir(tmp_path)  # not here, which is what a blank path would mean
    for blank in ("", " "):
        monkeypatch.setenv("R2DLLM_ENGINE_SOURCES", blank)
        assert their_generate("Fast-dLLM") is None
    monkeypatch.setenv("R2DLLM_ENGINE_SOURCES", str(tmp_path))
    assert their_generate("Fast-dLLM").name == "their_generate"
    assert their_generate("R2-dLLM") is None and "model.modeling_llada" not in sys.modules


@pytest.mark.parametrize("which", ["tokens", "forwards"])
def test_a_difference_ends_the_run(r2, monkeypatch, capsys, which):
    import engine_cases
    import engines

    loops = engine_cases.STEPS[PASS].loops

    def other(problem):
        ours, theirs, source = loops(problem)
        if which == "forwards":
            return ours, theirs._replace(forwards=lambda: 2), source
        return ours, theirs._replace(call=lambda: (problem.tokens, problem.tokens > 0)), source

    step = engine_cases.STEPS[PASS]._replace(loops=other)
    monkeypatch.setitem(engine_cases.STEPS, PASS, step)
    monkeypatch.setattr(sys, "argv", ["engines.py"])
    with pytest.raises(SystemExit) as raised:
        engines.main(["--step", PASS, "--shape", "1,32,900"])
    assert raised.value.code == 1
    words = {"tokens": "what is decoded differs", "forwards": "1 forwards, theirs 2"}[which]
    assert f"engines.py: {PASS}: {words}" in capsys.readouterr().out


def test_run(r2, tmp_path):
    out = tmp_path / "engines.json"
    options = ["--shape", "1,64,16384", "--seconds", "0.05", "--threads", "1", "--json", str(out)]
    for name, engine in STEPS.items():  # one that is installed may take long to import
        if engine is None or importlib.util.find_spec(engine) is None:
            options += ["--step", name]
    command = [sys.executable, str(BENCH / "engines.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert {"schema", "machine", "versions", "commit", "command", "settings", "bars"} <= set(
        content
    )
    assert str(tmp_path) not in out.read_text()
    (record,) = content["records"]
    assert record["checked"] and record["op"] == PASS and record["bytes"] == 64 * 16384 * 2
    assert record["engine"]["version"] in ("restated", "checkout")
    medians = [record["columns"][way]["median_us"] for way in ("theirs", "ours")]
    assert record["ratio"]["theirs"] == pytest.approx(medians[0] / medians[1], rel=1e-3)
    for name, reason in content["skipped"].items():
        assert reason == f"{STEPS[name]} is not installed"
        assert f"{name} skipped: {reason}" in done.stdout
    peaks = record["extra_peak_bytes"]
    if isinstance(peaks, dict):  # their two float64 tensors; only open rows of ours are read
        assert peaks["theirs"] > 1.9 * 64 * 16384 * 8 and peaks["ours"] < 64 * 16384


def test_bars():
    from bars import engine_bars

    def record(B: int, V: int, times: float) -> dict:
        return {"op": PASS, "shape": {"B": B, "L": 856, "V": V}, "ratio": {"theirs": times}}

    def verdicts(*records: dict) -> list[bool]:
        return [bar["passed"] for bar in engine_bars(records) if bar["passed"] is not None]

    assert verdicts(record(1, 126464, 199.0)) == [False]
    assert verdicts(record(1, 126464, 200.0)) == [True]
    assert verdicts(record(1, 900, 1.0), record(2, 126464, 1.0)) == []


def test_recorded_runs_hold_the_bars():
    from bars import ENGINES, engine_bars

    paths = list((BENCH / "results").glob("engines_*.json"))
    assert paths
    for path in paths:
        bars = engine_bars(json.loads(path.read_text())["records"])
        assert len(bars) == len(ENGINES) and all(bar["passed"] for bar in bars), path.name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--step", "vllm"), "--step"),
        (("--shape", "1,2"), "--shape takes B,L,V"),
        (("--threads", "0"), "--threads takes"),
        (("--seconds", "0"), "--seconds takes"),
    ],
)
def test_errors_are_one_line(r2, monkeypatch, capsys, arguments, message):
    import engines

    monkeypatch.setattr(sys, "argv", ["engines.py"])
    with pytest.raises(SystemExit) as raised:
        engines.main(list(arguments))
    assert raised.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("engines.py: ") and message in stderr and stderr.count("\n") == 1
