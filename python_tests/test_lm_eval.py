# SPDX-License-Identifier: Apache-2.0
"""The harness's model `r2dllm`: a bundled model on a task of one's own, tiny LLaDA and Dream."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when their packages are imported

from checkpoints import DREAM, LLADA, random_weights, write  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from r2dllm_ext import DecodeConfig, generate, ledger, load_model  # noqa: E402
from r2dllm_ext.integrations import _lm_eval_decode  # noqa: E402
from r2dllm_ext.integrations import lm_eval as adapter  # noqa: E402
from r2dllm_ext.integrations.lm_eval import R2DLLM  # noqa: E402

CHAT = "{% for m in messages %}<bos> {{ m['role'] }} {{ m['content'] }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant{% endif %}"
SAMPLES = [ledger.make_sample(seed=0, index=i, split="test") for i in range(4)]
TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sums.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function judge.process_results
generation_kwargs: {{until: ["<none>"]}}
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
JUDGE = """\
from r2dllm_ext import ledger
def process_results(doc, results):
    return {"right": float(ledger.verify(doc["prompt"], results[0]).correct)}
"""


def checkpoint(folder: Path, shape: dict) -> str:
    """A tiny random checkpoint whose tokenizer has a word for each id."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    special = {0: "<bos>", 1: "<pad>", 2: "<unk>", 47: "<turn>", 48: "<end>", 49: "<mask>"}
    words = {3: "user", 4: "assistant"} | special
    ids = {words.get(i, f"w{i}"): i for i in range(50)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        "<bos> $A", None, [("<bos>", 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        **{"bos_token": "<bos>", "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"},
        mask_token="<mask>",
        additional_special_tokens=["<turn>"],
        chat_template=CHAT,
    )
    tokenizer.save_pretrained(folder)
    write(folder, shape, random_weights(shape))
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    shapes = {"llada": LLADA, "dream": DREAM}
    return {name: checkpoint(tmp_path_factory.mktemp(name), s) for name, s in shapes.items()}


def ask(contexts, task: str = "t", repeats: int = 1, **options) -> list[Instance]:
    """What the harness hands over."""
    return [
        Instance("generate_until", {}, (context, options), 0, (task, i, repeats))
        for i, context in enumerate(contexts)
        for _ in range(repeats)
    ]


def answers(model: R2DLLM, requests: list[Instance]) -> list[str]:
    return model.generate_until(requests, disable_tqdm=True)


PROMPTS = ["w7 w8 w9", "w10", "w11 w12", "w13 w14 w15 w16", "w17"]


# ---- answers -----------------------------------------------------------------------------------


def test_an_answer_is_that_of_generate(capsys):
    lm = R2DLLM("ledger-base", preset="fast_dllm", gen_length=64, batch_size="2")
    prompts = [sample.prompt for sample in SAMPLES[:2]]
    got = answers(lm, ask(prompts, until=["third"]))
    model, words = load_model("ledger-base"), ledger.Tokenizer()
    config, nfe = DecodeConfig.fast_dllm(words.mask_id), 0
    for prompt, text in zip(prompts, got, strict=True):
        ids = torch.tensor([words.encode(prompt)])
        out = generate(model, ids, gen_length=64, config=config, stop_id=words.end_id)
        whole = words.decode(out.sequences[0, ids.shape[1] :].tolist())
        assert text and text == whole.partition("third")[0]
        nfe += out.nfe
    costs = lm.get_model_info()["r2dllm"]["tasks"]["t"]
    assert (costs["answers"], costs["forwards"]) == (2, nfe / 2)
    assert costs["tokens"] == sum(len(words.encode(text)) + 1 for text in got) / 2
    assert f"r2dllm: t: 2 answers of {nfe / 2} forwards (NFE)" in capsys.readouterr().out


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_batch_changes_no_answer(tiny, family, cache):
    options = {"preset": "r2", "cache": cache, "gen_length": 16, "block_length": 8}
    one, three = (R2DLLM(tiny[family], batch_size=n, **options) for n in (1, 3))
    assert one._session.logits_shift == (family == "dream")
    requests = ask(PROMPTS, until=["w20"])
    got = answers(three, requests)
    assert got == answers(one, requests)
    assert len(set(got)) == 5


def test_a_chat_template_is_the_tokenizers(tiny):
    lm = R2DLLM(tiny["llada"], gen_length=8, block_length=8)
    said = lm.apply_chat_template([{"role": "user", "content": "w7 w8"}])
    assert said == "<bos> user w7 w8 assistant"
    begun = [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False).endswith("assistant w8")
    assert lm._codec.encode(said) == [0, 3, 7, 8, 4]  # no second <bos>
    assert lm._codec.encode("w7 w8") == [0, 7, 8]
    assert lm.chat_template(True) == CHAT and lm.tokenizer_name.endswith("llada0")


def test_a_text_ends_at_the_first_of_its_stops(tiny):
    lm = R2DLLM(tiny["llada"])
    ids = [7, 8, 47, 9, 10]
    assert lm._codec.decode(ids) == "w7 w8 <turn> w9 w10"
    cases = {
        (): ("w7 w8 w9 w10", 5, False),  # special tokens are no text
        ("w10", "w9"): ("w7 w8 ", 4, True),
        ("<turn>",): ("w7 w8 ", 3, True),
        ("7 w8 ",): ("w", 3, True),  # ends between a word and the special token
        ("w8", " w8 <"): ("w7", 3, True),
        (" w8 <turn> w9", " w8"): ("w7", 2, True),  # of two at one place the one that ends first
        (" w8", " w8 <turn> w9"): ("w7", 2, True),
        ("w7",): ("", 1, True),
        ("w11",): ("w7 w8 w9 w10", 5, False),
    }
    for until, want in cases.items():
        assert _lm_eval_decode.cut(lm._codec, ids, until) == want


def test_the_length_is_the_tasks_where_the_arguments_name_none(tiny):
    lm = R2DLLM(tiny["llada"], block_length=8, stop_id=[46])  # which it does not say
    requests = ask(PROMPTS[:1], max_gen_toks=11) + ask(PROMPTS[:1], max_new_tokens=8)
    eleven, eight = answers(lm, requests)
    assert [len(text.split()) for text in (eleven, eight)] == [11, 8]
    assert lm.get_model_info()["r2dllm"]["tasks"]["t"]["tokens"] == 9.5
    lm = R2DLLM(tiny["llada"], block_length=8, stop_id=[46], gen_length=16)
    (sixteen,) = answers(lm, ask(PROMPTS[:1], max_gen_toks=11))
    assert len(sixteen.split()) == 16 and sixteen.startswith(eleven)


def test_without_a_stop_token_all_blocks_are_decoded(capsys):
    prompts, costs = [sample.prompt for sample in SAMPLES[:1]], []
    for stop in (1, None):  # the ledger's end token
        lm = R2DLLM("ledger-base", preset="fast_dllm", stop_id=stop)
        costs.append((*answers(lm, ask(prompts)), lm.get_model_info()["r2dllm"]["tasks"]["t"]))
    (text, early), (same, whole) = costs
    assert text == same and early["tokens"] == whole["tokens"] < 96
    assert early["forwards"] <= whole["forwards"]


def test_a_task_that_draws_says_how(tiny):
    lm = R2DLLM(tiny["llada"], preset="vanilla", gen_length=16, block_length=16)
    draws = {"do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 0.95}
    first = answers(lm, ask(PROMPTS[:2], repeats=3, **draws))
    assert len(set(first[:3])) == 3
    assert first == answers(lm, ask(PROMPTS[:2], repeats=3, **draws))
    plain = answers(lm, ask(PROMPTS[:1], do_sample=False, temperature=0.7))
    assert plain == answers(lm, ask(PROMPTS[:1]))
    warm = R2DLLM(tiny["llada"], preset="vanilla", gen_length=16, block_length=16, temperature=2.0)
    assert plain != answers(warm, ask(PROMPTS[:1], do_sample=False))


def test_rows_without_an_answer_are_empty_and_counted(tiny):
    lm = R2DLLM(tiny["llada"], gen_length=8, block_length=8)
    with torch.no_grad():
        lm._session.model.embed.weight[17] = float("nan")
    with pytest.warns(UserWarning, match="1 empty answers"):
        got = answers(lm, ask(PROMPTS))
    assert got[4] == "" and all(got[:4])
    assert lm.get_model_info()["r2dllm"]["tasks"]["t"]["unfinished"] == 1


# ---- the file of answers -----------------------------------------------------------------------


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.jsonl"
    options = {"gen_length": 8, "block_length": 8, "batch_size": 2, "answers": str(path)}
    requests = ask(PROMPTS, until=["w20"])
    decoded: list[int] = []

    def decode(session, batch):
        if len(decoded) == 1:
            raise KeyboardInterrupt
        decoded.append(len(batch))
        return _lm_eval_decode.decode(session, batch)

    monkeypatch.setattr(adapter, "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        answers(R2DLLM(tiny["dream"], **options), requests)
    assert len(lines(path)) == 1 + 2
    with open(path, "a") as file:
        file.write('{"key": "ha')  # a kill while it was written
    decoded[:] = [0, 0]
    got = answers(R2DLLM(tiny["dream"], **options), requests)
    assert sum(decoded) == 3
    assert len(lines(path)) == 1 + 5
    monkeypatch.undo()
    assert got == answers(R2DLLM(tiny["dream"], **{**options, "answers": None}), requests)
    told = json.loads(path.with_suffix(".summary.json").read_text())
    assert told["tasks"]["t"]["answers"] == 5 and told["settings"]["logits_shift"] == 1


def test_each_file_of_answers_has_a_summary_of_its_own(tiny, tmp_path):
    for name in ("t0.8", "t0.9", "a.jsonl"):
        path = tmp_path / name
        answers(
            R2DLLM(tiny["dream"], gen_length=8, block_length=8, answers=str(path)), ask(PROMPTS)
        )
    written = {path.name for path in tmp_path.glob("*.summary.json")}
    assert written == {"t0.8.summary.json", "t0.9.summary.json", "a.summary.json"}


def test_a_file_of_something_else_is_refused(tiny, tmp_path):
    path = tmp_path / "a.jsonl"
    options = {"gen_length": 8, "block_length": 8, "answers": str(path)}
    answers(R2DLLM(tiny["llada"], **options), ask(PROMPTS[:2]))
    kept = path.read_text()
    with pytest.raises(ValueError, match="a.jsonl: .*threshold was 0.9, is 0.8. Take them, or"):
        R2DLLM(tiny["llada"], threshold=0.8, **options)
    with pytest.raises(ValueError, match="weights was '.*', is '.*'"):
        R2DLLM(tiny["dream"], **options)
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process"):
            R2DLLM(tiny["llada"], **options)
    assert path.read_text() == kept
    R2DLLM(tiny["llada"], batch_size=7, **options)  # no setting of an answer
    for other in ('{"prompt": "w7"}\n', "a letter\nof two lines", kept + '{"prompt": "w7"}\n'):
        path.write_text(other)
        with pytest.raises(ValueError, match="a.jsonl is no file of answers"):
            R2DLLM(tiny["llada"], **options)
        assert path.read_text() == other
    path.write_text(kept.replace('{"key"', "key", 1))
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        R2DLLM(tiny["llada"], **options)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"pretrained": None}, "pretrained takes a folder, a hub id .*, got None"),
        ({"treshold": 0.5}, "an argument takes one of pretrained, .*threshold.*, got 'treshold'"),
        ({"chat": True}, "an argument takes one of .*, got 'chat'"),
        ({"preset": "r3"}, "model r2dllm: --preset: invalid choice: 'r3'|: preset: invalid choice"),
        ({"gen_length": 1.5}, "gen_length: takes an integer >= 1, got '1.5'"),
        ({"threshold": 2}, "threshold takes .*, got 2"),
        ({"last_free": "maybe"}, "last_free takes True or False, got 'maybe'"),
        ({"batch_size": "auto"}, "batch_size takes an integer >= 1, got 'auto'"),
        ({"stop_id": [1, 99]}, "stop_id: token id 99, the model takes"),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(ValueError, match=error) as raised:
        R2DLLM(**{"pretrained": "ledger-base", **arguments})
    assert "\n" not in str(raised.value)


def test_arguments_as_the_harness_parses_them():
    lm = R2DLLM("ledger-base", seed=-11.0, top_k=None, last_free=False, stop_id=[1, 4])
    config = lm._session.config
    assert (config.seed, config.top_k, config.last_free) == (-11, None, False)
    assert lm._session.stop_id == (1, 4)
    given = R2DLLM.create_from_arg_string("pretrained=ledger-base,batch_size=3", {"batch_size": 1})
    assert given._batch_size == 3
    if not torch.cuda.is_available():  # the harness's default, asked for or not
        with pytest.warns(UserWarning, match="sees no cuda:0"):
            R2DLLM.create_from_arg_obj({"pretrained": "ledger-base"}, {"device": "cuda:0"})


def test_bad_requests(tiny):
    lm = R2DLLM(tiny["llada"], gen_length=32)
    with pytest.raises(ValueError, match="task t, document 0: generation_kwargs: .*'num_beams'"):
        answers(lm, ask(PROMPTS[:1], num_beams=4))
    with pytest.raises(
        ValueError, match="task t, document 1: a prompt of 41 tokens and 32 .*gen_le"
    ):
        answers(lm, ask(["w7", "w7 " * 40]))
    with pytest.raises(
        ValueError, match="generation_kwargs: max_gen_toks takes an integer >= 1, got 0"
    ):
        answers(R2DLLM(tiny["llada"]), ask(PROMPTS[:1], max_gen_toks=0))
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        with pytest.raises(
            NotImplementedError, match=f"generate_until, got {kind} requests of arc"
        ):
            getattr(lm, kind)(ask(PROMPTS, task="arc"))
    with pytest.raises(ValueError, match="--apply_chat_template takes no name.*, got 'rag'"):
        lm.chat_template("rag")
    with pytest.raises(ValueError, match="--apply_chat_template takes .*, got 'ledger-base'"):
        R2DLLM("ledger-base").apply_chat_template([])


# ---- the harness itself ------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path) -> list[str]:
    """Its command line on a task of one's own."""
    (tmp_path / "sums.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "judge.py").write_text(JUDGE)
    docs = [{"prompt": s.prompt, "answer": s.answer} for s in SAMPLES]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    arguments = f"pretrained=ledger-base,preset=fast_dllm,answers={tmp_path}/a.jsonl"
    options = {"model": "r2dllm", "model_args": arguments, "tasks": "sums", "device": "cpu"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [*words, "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]


def test_a_killed_evaluation_goes_on(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    module = "r2dllm_ext.integrations.lm_eval"
    process = subprocess.Popen([sys.executable, "-m", module, *command, "--batch_size", "1"])
    path, deadline = tmp_path / "a.jsonl", time.monotonic() + 600
    while not (path.exists() and path.read_bytes().count(b"\n") > 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_text().splitlines()
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command, "--batch_size", "3"])
    assert adapter.main() == 0
    assert path.read_text().splitlines()[: len(before) - 1] == before[:-1]
    assert len(lines(path)) == 1 + 4
    (result,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(result.read_text())
    judged = [
        [ledger.verify(s.prompt, a["text"]).correct for s in SAMPLES] for a in lines(path)[1:]
    ]
    assert found["results"]["sums"]["right,none"] == sum(map(any, judged)) / 4 > 0
    costs = found["config"]["r2dllm"]["tasks"]["sums"]
    assert costs == json.loads((tmp_path / "a.summary.json").read_text())["tasks"]["sums"]
    assert 1 < costs["tokens_per_forward"] < 32
    assert f"r2dllm: sums: 4 answers of {costs['forwards']} forwards" in capsys.readouterr().out


def test_the_command_says_errors_in_one_line(monkeypatch, capsys):
    def harness():
        R2DLLM("ledger-base", preset="r3")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", harness)
    monkeypatch.setattr(sys, "argv", ["lm_eval"])
    assert adapter.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("r2dllm: error: lm_eval: model r2dllm: preset: invalid choice: 'r3'")
    assert error.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--traceback"])
    with pytest.raises(ValueError, match="invalid choice: 'r3'"):
        adapter.main()
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: os.kill(os.getpid(), 2))
    assert adapter.main() == 130


def test_the_entry_point_is_the_class():
    tomllib = pytest.importorskip("tomllib")
    project = Path(__file__).parent.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("needs the source tree beside the tests")
    points = tomllib.loads(project.read_text())["project"]["entry-points"]["lm_eval.models"]
    assert points == {"r2dllm": f"{R2DLLM.__module__}:{R2DLLM.__name__}"}
