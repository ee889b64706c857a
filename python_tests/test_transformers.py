# SPDX-License-Identifier: Apache-2.0
"""`integrations.transformers`: `model.generate(custom_generate=...)`, callable and folder, on tiny
random models of the two published families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from r2dllm_ext import DecodeConfig, generate
from r2dllm_ext.models import ModelConfig, Transformer

pytest.importorskip("transformers", reason="needs transformers 5.24")
from transformers import (  # noqa: E402
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)
from transformers.generation import GenerateDecoderOnlyOutput  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402
from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: E402

from r2dllm_ext.integrations.transformers import CUSTOM_GENERATE, r2_generate  # noqa: E402

MASK, EOS, PAD = 39, 38, 37
CONFIG = DecodeConfig.r2(MASK, threshold=0.7)


class TinyConfig(PreTrainedConfig):
    model_type = "tiny_mdlm"

    def __init__(self, num_hidden_layers: int = 2, **options) -> None:
        self.num_hidden_layers = num_hidden_layers  # transformers prepares a cache of its own
        super().__init__(**options)


class Tiny(PreTrainedModel, GenerationMixin):
    """The calling convention of LLaDA's and Dream's published classes; nothing is known of its
    embedding, and it counts its calls."""

    config_class = TinyConfig

    def __init__(self, config: TinyConfig, family: str = "llada") -> None:
        super().__init__(config)
        heads = {"kv_heads": 2} if family == "dream" else {}
        own = ModelConfig(
            family, 40, width=32, layers=2, heads=4, mlp_width=48, max_length=128, **heads
        )
        self.body, self.calls = Transformer(own), 0
        for weight in self.body.parameters():
            if weight.dim() == 2:  # wild enough that cells differ and thresholds pass
                weight.data.normal_(std=0.3)
        self.post_init()

    def _init_weights(self, module) -> None:
        pass

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        replace_position=None,
        dual_cache=False,
    ):
        self.calls += 1
        given = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        given |= {"replace_position": replace_position}
        if dual_cache:
            given["dual_cache"] = True
        given = {name: value for name, value in given.items() if value is not None}
        output = self.body(input_ids, use_cache=bool(use_cache), **given)
        logits = 4 * output.logits
        logits[..., MASK] = -1e4
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


def tiny(seed: int = 0, family: str = "llada") -> Tiny:
    torch.manual_seed(seed)
    model = Tiny(TinyConfig(), family).eval()
    model.generation_config.pad_token_id = PAD
    return model


@pytest.fixture
def model() -> Tiny:
    return tiny()


def prompt_of(rows: int, length: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(36, (rows, length), generator=torch.Generator().manual_seed(seed))


def ours(model, prompt, new, length=8, config=CONFIG, **options):
    return generate(
        model, prompt, gen_length=new, block_length=length, config=config, **options
    ).sequences


def theirs(model, prompt, new=24, length=8, custom=r2_generate, config=CONFIG, **options):
    if isinstance(custom, str):
        options["trust_remote_code"] = True
    return model.generate(
        prompt,
        max_new_tokens=new,
        custom_generate=custom,
        r2_config=config,
        block_length=length,
        **options,
    )


BOTH = pytest.mark.parametrize("custom", [r2_generate, CUSTOM_GENERATE], ids=["callable", "folder"])


@BOTH
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_and_forwards_are_those_of_generate(custom, rows, model):
    prompt = prompt_of(rows)
    want = ours(model, prompt, 24)
    model.calls, calls = 0, model.calls
    assert torch.equal(theirs(model, prompt, custom=custom), want)
    assert model.calls == calls < 24
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()  # which `generate` asks for, and does without


@BOTH
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(("family", "shift"), [("llada", 0), ("dream", 1)])
def test_caches(custom, cache, family, shift):
    model, prompt = tiny(1, family), prompt_of(2)
    want = ours(model, prompt, 24, cache=cache, logits_shift=shift)
    got = theirs(model, prompt, custom=custom, r2_cache=cache, logits_shift=shift)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="r2_cache takes 'none' with use_cache=False"):
        theirs(model, prompt, r2_cache=cache, use_cache=False)


def test_the_last_block_is_cut(model):
    prompt = prompt_of(2)
    want = ours(model, prompt, 24)
    for new in (1, 8, 17, 23):
        rounded = ours(model, prompt, -(-new // 8) * 8)
        assert torch.equal(theirs(model, prompt, new=new), rounded[:, : 5 + new])
    by_length = theirs(model, prompt, new=None, max_length=29)
    assert torch.equal(by_length, want)


@BOTH
def test_rows_padded_on_the_left_are_as_alone(custom, model):
    prompt, mask = prompt_of(3, 6), torch.ones(3, 6, dtype=torch.int64)
    for row, padding in enumerate((0, 2, 5)):
        prompt[row, :padding], mask[row, :padding] = PAD, 0
    got = theirs(model, prompt, custom=custom, attention_mask=mask)
    for row, padding in enumerate((0, 2, 5)):
        alone = theirs(model, prompt[row : row + 1, padding:])
        assert torch.equal(got[row, 6:], alone[0, 6 - padding :])


class Positions(Tiny):
    """A model that asks for its positions: they have to be those of its tokens."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **options):
        if attention_mask is not None:
            seen = position_ids.expand_as(attention_mask)[attention_mask == 1]
            counts = attention_mask.sum(1).tolist()
            assert seen.tolist() == [i for count in counts for i in range(count)]
            self.seen = True
        return super().forward(input_ids, attention_mask, **options)


def test_positions_of_padded_rows():
    model = Positions(TinyConfig()).eval()
    prompt, mask = prompt_of(2), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    got = theirs(model, prompt, attention_mask=mask)
    want = ours(
        lambda ids, **given: Tiny.forward(model, ids, **given), prompt, 24, attention_mask=mask
    )
    assert model.seen and torch.equal(got, want)
    with pytest.raises(ValueError, match="position_ids takes None, or 0, 1, 2"):
        theirs(model, prompt, position_ids=torch.arange(5)[None] + 7)


# ---- where answers end -----------------------------------------------------------------------


def test_an_answer_ends_with_the_first_stop_token(model):
    """Rows that end early are padded, the batch is as long as its longest row."""
    prompt = prompt_of(4)
    whole = ours(model, prompt, 24)
    stops = [int(whole[0, 7]), int(whole[1, 20])]
    got = theirs(model, prompt, eos_token_id=stops)
    stopped = ours(model, prompt, 24, stop_id=stops)
    ends = []
    for row in range(4):
        answer = stopped[row, 5:].tolist()
        ends.append(min([i for i, t in enumerate(answer) if t in stops] + [23]) + 1)
        assert got[row, 5 : 5 + ends[-1]].tolist() == answer[: ends[-1]]
        assert (got[row, 5 + ends[-1] :] == PAD).all()
    assert got.shape[1] == 5 + max(ends) and min(ends) < max(ends)


class AfterTokens(StoppingCriteria):
    """Ends a row whose last token is one of some; like a stop string."""

    def __init__(self, tokens, batch_answer=True):
        self.tokens, self.batch_answer = tokens, batch_answer

    def __call__(self, input_ids, scores, **kwargs):
        assert (input_ids != MASK).all()
        met = torch.isin(input_ids[:, -1], torch.tensor(self.tokens))
        return met if self.batch_answer else bool(met.all())


@BOTH
def test_stopping_criteria(custom, model):
    """Looked at for each token of a finished block, as a loop over tokens would."""
    prompt = prompt_of(3)
    whole = ours(model, prompt, 24)
    tokens = [int(whole[0, 6]), int(whole[1, 15]), int(whole[2, 9])]
    model.calls = 0
    criteria = StoppingCriteriaList([AfterTokens(tokens)])
    got = theirs(model, prompt, custom=custom, stopping_criteria=criteria)
    ends = [next(i for i in range(5, 29) if int(t[i]) in tokens) + 1 for t in whole]
    assert got.shape[1] == max(ends) < 29
    for row, end in enumerate(ends):
        assert torch.equal(got[row, :end], whole[row, :end]) and (got[row, end:] == PAD).all()
    calls = model.calls
    ours(model, prompt, 24)
    assert calls < model.calls - calls  # no forward once all rows have ended
    one = StoppingCriteriaList([AfterTokens([int(whole[0, 6])], batch_answer=False)])
    assert theirs(model, prompt[:1], stopping_criteria=one).shape[1] == ends[0]


def test_stop_strings_with_the_folder(model):
    """An answer ends with the token that completes one."""
    words = pytest.importorskip("tokenizers")
    letters = {chr(ord("A") + i): i for i in range(40)}
    core = words.Tokenizer(words.models.WordLevel(letters | {"abcdef": 40}))  # asked for by theirs
    core.decoder = words.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    prompt = prompt_of(1)
    answer = "".join(chr(ord("A") + i) for i in ours(model, prompt, 24)[0, 5:].tolist())
    stop = answer[10:12]
    got = theirs(model, prompt, custom=CUSTOM_GENERATE, tokenizer=tokenizer, stop_strings=stop)
    assert got.shape[1] == 5 + answer.index(stop) + 2
    with pytest.raises(ValueError, match="tokenizer"):  # transformers' own: it drops it here
        theirs(model, prompt, tokenizer=tokenizer, stop_strings=stop)


def test_time_is_looked_at_when_a_block_is_finished(model):
    assert theirs(model, prompt_of(1), max_time=0.0).shape[1] == 5 + 8
    assert theirs(model, prompt_of(1), max_time=60.0).shape[1] == 5 + 24


class Listener(BaseStreamer):
    def __init__(self, model):
        self.model, self.parts, self.calls, self.ended = model, [], [], False

    def put(self, value):
        assert not self.ended and value.device.type == "cpu"
        self.parts.append(value)
        self.calls.append(self.model.calls)

    def end(self):
        self.ended = True


@BOTH
@pytest.mark.parametrize("eos", [None, "early"])
def test_a_streamer_gets_blocks_as_they_are_finished(custom, eos, model):
    prompt = prompt_of(1)
    answer, stop = ours(model, prompt, 24)[0, 5:].tolist(), None
    if eos:  # a token that comes for the first time in the second block
        stop = next(t for i, t in enumerate(answer) if i > 8 and t not in answer[:i])
    model.calls = 0
    listener = Listener(model)
    name = "streamer" if isinstance(custom, str) else "r2_streamer"
    got = theirs(model, prompt, custom=custom, eos_token_id=stop, **{name: listener})
    assert listener.ended and torch.equal(torch.cat(listener.parts, dim=1), got)
    sizes = [part.shape[1] for part in listener.parts]
    assert sizes == [5, 8, got.shape[1] - 13] if eos else sizes == [5, 8, 8, 8]
    assert listener.calls[0] == 0 and listener.calls == sorted(set(listener.calls))


def test_several_rows_are_streamed_padded(model):
    prompt, listener = prompt_of(3), Listener(model)
    stop = int(ours(model, prompt, 24)[0, 7])
    got = theirs(model, prompt, eos_token_id=stop, r2_streamer=listener)
    assert torch.equal(torch.cat(listener.parts, dim=1), got)


# ---- options of GenerationConfig -------------------------------------------------------------


def test_sampling_options_are_those_of_the_config(model):
    prompt = prompt_of(2)
    options = {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "min_p": 0.05}
    set_seed(5)
    got = theirs(model, prompt, do_sample=True, **options)
    set_seed(5)
    config = CONFIG.replace(**options, seed=int(torch.randint(2**62, ())))
    assert torch.equal(got, ours(model, prompt, 24, config=config))
    again = theirs(model, prompt, do_sample=True, **options)
    assert not torch.equal(got, again)
    both = CONFIG.replace(temperature=0.5)
    assert theirs(model, prompt, config=both).shape == got.shape  # ours, without do_sample
    with pytest.raises(ValueError, match="r2_config.temperature takes its default with do_sample"):
        theirs(model, prompt, do_sample=True, config=both)


def test_several_answers_of_a_prompt(model):
    got = theirs(model, prompt_of(2), do_sample=True, num_return_sequences=3)
    assert got.shape == (6, 29) and (got[:3, :5] == got[0, :5]).all()


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"bad_words_ids": [[3]]}, "NoBadWordsLogitsProcessor"),
        ({"min_new_tokens": 3, "eos_token_id": EOS}, "MinLengthLogitsProcessor"),
        ({"suppress_tokens": [3]}, "SuppressTokensLogitsProcessor"),
        ({"do_sample": True, "typical_p": 0.5}, "TypicalLogitsWarper"),
        ({"renormalize_logits": True}, "LogitNormalization"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [1]}, "PrefixConstrainedLogitsProcessor"),
        ({"logits_processor": [lambda ids, scores: scores]}, "function"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_logits_processors_are_refused_by_name(option, named, model):
    with pytest.raises(ValueError, match=f"logits_processor takes none .*, got '{named}'"):
        theirs(model, prompt_of(1), **option)


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 2},
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_hidden_states": True},
        {"length_penalty": 2.0},
        {"typical_p": 0.5},
        {"prefill_chunk_size": 4},
        {"num_assistant_tokens": 5},
    ],
    ids=lambda option: next(iter(option)),
)
def test_other_options_are_refused_by_name(option, model):
    with pytest.raises(ValueError, match=f"r2_generate: {next(iter(option))} takes"):
        theirs(model, prompt_of(1), generation_config=GenerationConfig(**option, pad_token_id=PAD))


def test_every_option_at_its_default_is_taken(model):
    """None of them by accident: what transformers' defaults hold is no reason to refuse."""
    defaults = GenerationConfig._get_default_generation_params()
    theirs(model, prompt_of(1), generation_config=GenerationConfig(**defaults))


def test_arguments_that_are_not_known_are_refused(model):
    with pytest.raises(ValueError, match="`model_kwargs` are not used by the model: .'blok_length"):
        theirs(model, prompt_of(1), blok_length=4)
    with pytest.raises(ValueError, match="replace_position takes None"):
        theirs(model, prompt_of(1), replace_position=torch.zeros(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="assistant_model takes None"):
        theirs(model, prompt_of(1), custom=CUSTOM_GENERATE, assistant_model=model)


def test_the_mask_id_of_the_model(model):
    prompt = prompt_of(1)
    with pytest.raises(ValueError, match="r2_config takes a DecodeConfig where neither"):
        theirs(model, prompt, config=None)
    model.config.mask_token_id = MASK
    want = ours(model, prompt, 24, config=DecodeConfig.r2(MASK))
    assert torch.equal(theirs(model, prompt, config=None), want)
    with pytest.raises(TypeError, match="r2_config takes a DecodeConfig, got dict"):
        theirs(model, prompt, config={"mask_id": MASK})


def test_return_dict(model):
    got = theirs(model, prompt_of(1), return_dict_in_generate=True)
    assert isinstance(got, GenerateDecoderOnlyOutput)
    assert torch.equal(got.sequences, ours(model, prompt_of(1), 24))


def test_another_version_is_one_error(model, monkeypatch):
    from r2dllm_ext.integrations import _versions

    monkeypatch.setattr(_versions.metadata, "version", lambda package: "6.0.0")
    with pytest.raises(ImportError, match="tested with transformers 5.24.0, but .* 6.0.0"):
        theirs(model, prompt_of(1))


def test_the_package_ships_the_folder(monkeypatch):
    """What setuptools would put into a wheel."""
    root = Path(__file__).parent.parent
    if not (root / "pyproject.toml").exists():
        pytest.skip("needs the source tree beside the tests")
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(root)
    distribution = setuptools.Distribution()
    distribution.parse_config_files()
    distribution.include_package_data = False  # by the patterns alone, without a manifest
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    files = {str(Path(folder, name)) for _, folder, _, names in build.data_files for name in names}
    shipped = Path(CUSTOM_GENERATE).relative_to(root) / "custom_generate" / "generate.py"
    assert str(shipped) in files
