# SPDX-License-Identifier: Apache-2.0
"""What `r2dllm` promises of odd input and odd surroundings: an answer, or one line and a status."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r2dllm_ext.cli import main, session
from r2dllm_ext.cli.display import Display
from r2dllm_ext.models import ModelConfig, Transformer, save_model
from r2dllm_ext.sft.artefacts import read_lines, settle_lines
from r2dllm_ext.tasks.ledger import Tokenizer
from r2dllm_ext.text_input import read_text, split_lines

WORDS = Tokenizer()
PROMPT = "begin at 1 2 . answer :"
THIRTY = "9" * 30
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("ledger")
    ids = {"mask_id": WORDS.mask_id, "eos_id": WORDS.end_id, "pad_id": WORDS.pad_id}
    shape = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 32, "max_length": 512}
    config = ModelConfig("llada", vocab_size=len(WORDS), **ids, **shape)
    save_model(Transformer(config).init_weights(5, std=0.4), folder)
    return str(folder)


def fails(result: SimpleNamespace, *words: str) -> None:
    """Status 2 and one line on stderr that says these words."""
    assert result.status == 2
    assert result.err.startswith("r2dllm: error: ") and result.err.count("\n") == 1
    for word in words:
        assert word in result.err


# text that comes in


BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_newlines_alone(tmp_path, end):
    assert split_lines(f"a{BREAKS}b{end}{end}c{end}") == [f"a{BREAKS}b", "", "c"]
    assert split_lines("") == [] and split_lines("a") == ["a"]
    file = tmp_path / "records.jsonl"
    records = [{"prompt": f"x{BREAKS[:3]}y"}, {"prompt": "z"}]
    text = end.join(json.dumps(record, ensure_ascii=False) for record in records)
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_lines(file) == records


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_prompts_of_files_and_stdin(run, ledger, tmp_path, monkeypatch, mark):
    data = mark + "begin\u2028at\x0c1\r\nto the end\x85\n".encode()
    expected = ["begin\u2028at\x0c1", "to the end\x85"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)
    options = ["--model", ledger, "--json", "--gen-length", 32]
    raw = io.TextIOWrapper(io.BytesIO(data), encoding="latin-1")
    for source, stdin in ((file, None), ("-", raw), ("-", io.StringIO(data.decode()))):
        monkeypatch.setattr("sys.stdin", stdin)
        result = run("generate", "--file", source, *options)
        assert (result.status, result.err) == (0, "")
        assert [json.loads(x)["prompt"] for x in result.out.split("\n")[:-1]] == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_text_in_another_encoding_names_the_file(run, tmp_path, encoding):
    file = tmp_path / "prompts.txt"
    file.write_bytes("begin at 1 \xe9\n".encode(encoding))
    fails(run("generate", "--file", file, "--json"), f"{file} is not UTF-8 text")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_text(file)


@pytest.mark.parametrize("line", ['{"a": ' + "9" * 5000 + "}", "[" * 100_000])
def test_json_that_python_can_not_hold_names_the_line(tmp_path, line):
    file = tmp_path / "records.jsonl"
    file.write_text('{"a": 1}\n' + line)
    with pytest.raises(ValueError, match="records.jsonl: line 2 is not JSON"):
        read_lines(file)


def test_prompts_with_nan_are_those_that_the_run_began_with(tmp_path):
    file, records = tmp_path / "prompts.jsonl", [{"prompt": "x", "weight": float("nan")}]
    settle_lines(file, records)
    settle_lines(file, records)
    with pytest.raises(ValueError, match="other prompts"):
        settle_lines(file, [{"prompt": "x", "weight": 1.0}])


# numbers that no tensor holds


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--ids", THIRTY], ["token id 9", "the model takes 0..55"]),
        (["--ids", "1" * 5000], ["--ids: a prompt takes token ids, got '1111"]),
        ([PROMPT, "--gen-length", THIRTY], ["--gen-length", "takes an integer >= 1 of 64 bits"]),
        ([PROMPT, "--gen-length", "9" * 5000], ["--gen-length"]),
        ([PROMPT, "--gen-length", 2**63 - 32], ["--gen-length", "512 positions"]),
        ([PROMPT, "--gen-length", 512], ["7 tokens and 512 to decode", "512 positions"]),
        ([PROMPT, "--batch-size", THIRTY], ["--batch-size"]),
        ([PROMPT, "--block-length", THIRTY], ["--block-length"]),
        ([PROMPT, "--stop-id", THIRTY], ["--stop-id", "of 64 bits"]),
        ([PROMPT, "--stop-id", 56], ["stop_id: token id 56, the model takes 0..55"]),
        ([PROMPT, "--stop-id", -1], ["stop_id: token id -1"]),
        ([PROMPT, "--mask-id", THIRTY], ["--mask-id"]),
        ([PROMPT, "--device", "meta"], ["--device takes cpu, cuda or cuda:N, got 'meta'"]),
        ([PROMPT, "--seed", f"-{THIRTY}"], ["--seed"]),
        ([PROMPT, "--top-k", THIRTY], ["--top-k"]),
    ],
)
def test_numbers_of_thirty_digits(run, ledger, arguments, words):
    result = run("generate", "--json", "--model", ledger, *arguments)
    fails(result, *words)
    assert result.out == "" and len(result.err) < 6000


def test_frames_of_cpp_are_not_in_the_line(run, monkeypatch):
    message = "can't allocate memory\nframe #0: c10::x() + 0x8 (0x7f in lib.so)\nframe #1: y"

    def fail(*_):
        raise RuntimeError(message)

    monkeypatch.setattr("r2dllm_ext.cli.generate.read_prompts", fail)
    result = run("generate", "x")
    assert (result.status, result.err) == (2, "r2dllm: error: can't allocate memory\n")


@pytest.mark.parametrize("error", [KeyError("k"), AttributeError("a"), OverflowError("o")])
def test_an_error_that_nobody_foresaw_is_a_line_too(run, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("r2dllm_ext.cli.generate.read_prompts", fail)
    fails(run("generate", "x"), type(error).__name__, "--traceback")
    with pytest.raises(type(error)):
        main(["generate", "x", "--traceback"])


# rows that can't be finished


def test_answers_that_exist_are_printed_before_the_error(run, ledger, monkeypatch):
    stuck = WORDS.encode("well")[0]
    plain = session.load_model(ledger)

    class Breaks:
        def __getattr__(self, name):
            return getattr(plain, name)

        def __call__(self, ids, **options):
            output = plain(ids, **options)
            rows = (ids == stuck).any(1)[:, None, None]
            return output._replace(logits=output.logits.masked_fill(rows, torch.nan))

    options = ["--model", ledger, "--json", "--gen-length", 32]
    others = [
        json.loads(x) for x in run("generate", "begin", "to", "at", *options).out.splitlines()
    ]
    monkeypatch.setattr(session, "load_model", lambda *a, **k: Breaks())
    given = ["begin", "well", "to", "well well", "at"]
    for size in (1, 2, 8):
        result = run("generate", *given, *options, "--batch-size", size)
        assert [json.loads(x) for x in result.out.splitlines()] == others
        fails(result, "no answer to prompt 2, 4: ", "no progress at step 1", "non-finite")


# stop ids


def test_any_of_several_stop_ids_ends_an_answer(run, ledger):
    options = ["generate", PROMPT, "--model", ledger, "--gen-length", 32, "--json"]
    options += ["--preset", "vanilla"]
    free = json.loads(run(*options, "--stop-id", "none").out)["token_ids"]
    absent = next(i for i in range(3, 56) if i not in free)
    first = free[7]
    alone = json.loads(run(*options, "--stop-id", first).out)
    for ids in ([first, absent], [absent, first]):
        arguments = [word for i in ids for word in ("--stop-id", i)]
        assert json.loads(run(*options, *arguments).out) == alone
    fails(run(*options, "--stop-id", 3, "--stop-id", "none"), "--stop-id takes ids or none")


def test_the_end_tokens_of_a_model_may_be_several(run, ledger, monkeypatch):
    options = ["generate", PROMPT, "--model", ledger, "--gen-length", 32, "--json"]
    free = json.loads(run(*options, "--stop-id", "none").out)["token_ids"]
    given = json.loads(run(*options, "--stop-id", free[0], "--stop-id", free[5]).out)
    monkeypatch.setattr(Transformer, "eos_id", (free[0], free[5]), raising=False)
    assert json.loads(run(*options).out) == given


# streams, variables and signals of a process


def process(shell: str, ledger: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a line of bash in which `$r2dllm` is the command, `$generate` one that works."""
    r2dllm = f"'{sys.executable}' -m r2dllm_ext"
    generate = f"{r2dllm} generate '{PROMPT}' --model '{ledger}' --json --gen-length 32"
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        ["bash", "-c", f'r2dllm="{r2dllm}"; {shell.replace("$generate", generate)}'],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
    )


@pytest.mark.parametrize(
    "shell, status, stderr",
    [
        ("$generate >&-", 2, "r2dllm: error: stdout is closed"),
        ("$generate --file - <&-", 2, "r2dllm: error: stdin is closed"),
        ("$generate >/dev/full", 2, "r2dllm: error: No space left on device"),
        ("$generate --stop-id x 2>/dev/full", 2, ""),
        ("$generate --stop-id x >/dev/full 2>/dev/full", 2, ""),
        ("$generate --stop-id x 2>&-", 2, ""),
        ("$generate --help | true; exit ${PIPESTATUS[0]}", None, ""),
    ],
)
def test_streams_that_are_closed_or_full(ledger, shell, status, stderr):
    result = process(shell, ledger)
    assert result.returncode == status or status is None and result.returncode in (0, 141)
    assert result.stdout == "" and result.stderr.startswith(stderr)
    assert result.stderr.count("\n") == bool(stderr)


def test_with_stderr_closed_stdout_is_json_alone(ledger):
    result = process("$generate --progress 2>&-", ledger)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 1
    assert json.loads(result.stdout)["prompt"] == PROMPT


def heed_interrupts():
    """In the child: a job in the background of a script starts with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("script", ["-m r2dllm_ext", "r2dllm"])
def test_an_interrupt_during_the_import(tmp_path, script):
    """A torch that is interrupted while it is imported stands in for a user who is quick."""
    (tmp_path / "torch").mkdir()
    source = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / "torch" / "__init__.py").write_text(source)
    (tmp_path / "r2dllm").write_text("from r2dllm_ext.cli import main\nmain()\n")
    command = script.split() if script.startswith("-m") else [str(tmp_path / script)]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [sys.executable, *command, "demo"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        preexec_fn=heed_interrupts,
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_importing_the_package_leaves_the_interrupt_alone():
    code = "import r2dllm_ext, signal; print(signal.getsignal(signal.SIGINT).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=heed_interrupts
    )
    assert done.stdout == f"{signal.default_int_handler.__name__}\n"


@pytest.mark.parametrize("name, coloured", [("FORCE_COLOR", True), ("NO_COLOR", True)])
def test_empty_environment_variables_are_unset(monkeypatch, name, coloured):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for variable in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"TERM": "xterm", "COLORTERM": "truecolor", name: ""}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("sys.stdout", Terminal())
    assert bool(Display()._colours) is coloured
