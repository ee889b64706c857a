# SPDX-License-Identifier: Apache-2.0
"""What a config.json may say: read alike for both families, or refused by file and field."""

import math

import pytest
import torch
from cases import roundings
from checkpoints import DREAM, LLADA

from r2dllm_ext.models import ModelConfig
from r2dllm_ext.models.rope import RopeScaling

read = ModelConfig.from_hf_config
BOTH = pytest.mark.parametrize("config", [LLADA, DREAM], ids=["llada", "dream"])


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


@BOTH
def test_rope_parameters_are_the_same_rope_as_flat_fields(config):
    bare = without(config, "rope_theta")
    assert read(bare).rope_theta == 10000.0
    for nested in ({"rope_type": "default"}, {"type": "default", "partial_rotary_factor": 1.0}, {}):
        assert read(bare | {"rope_parameters": nested | {"rope_theta": 123.0}}).rope_theta == 123.0
        assert read(config | {"rope_parameters": nested}) == read(config)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    flat = read(config | {"rope_scaling": yarn})
    assert flat.rope_scaling == RopeScaling("yarn", 4.0, 32, attention_factor=0.1 * math.log(4) + 1)
    nested = yarn | {"rope_theta": config["rope_theta"]}
    assert read(bare | {"rope_parameters": nested}) == flat
    assert read(config | {"rope_parameters": nested, "rope_scaling": yarn}) == flat


@BOTH
@pytest.mark.parametrize("none", [None, False, {}, {"rope_type": "default"}, {"type": "default"}])
def test_rope_scaling_that_means_none_is_none(config, none):
    assert read(config | {"rope_scaling": none}) == read(config)
    assert read(config | {"rope_parameters": none}) == read(config)


@BOTH
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"type": "ntk"}, "takes a rope_type of .*, got {'type': 'ntk'}"),
        ({"rope_type": "dynamic", "factor": 2}, "dynamic and longrope .* not supported"),
        ({"rope_type": "longrope", "short_factor": [1]}, "dynamic and longrope .* not supported"),
        ({"rope_type": None}, "takes a rope_type of .*, got {'rope_type': None}"),
        ({"rope_type": ["yarn"]}, "takes a rope_type of"),
        ({"rope_type": "default", "type": "mrope"}, "takes a rope_type of"),
        ({"factor": 2}, "of rope_type 'default' takes no factor, got {'factor': 2}"),
        ({"rope_type": "linear"}, "of rope_type 'linear' takes a factor"),
        ({"rope_type": "linear", "factor": "2"}, r"\.factor takes a number in .*, got '2'"),
        ({"rope_type": "linear", "factor": True}, r"\.factor takes a number in .*, got True"),
        ({"rope_type": "linear", "factor": 0.5}, r"\.factor takes a number >= 1, got 0\.5"),
        ({"rope_type": "linear", "factor": 2, "beta_fast": 3}, "takes no beta_fast"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "takes no partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "takes no full_attention"),
        ({"rope_type": "default", "rope_theta": 0}, r"\.rope_theta takes a number in .*, got 0"),
        ({"rope_type": "default", "rope_theta": "1e6"}, r"\.rope_theta takes .*, got '1e6'"),
        ({"rope_type": "default", "rope_theta": 7.0}, "take one rope_theta, got .*7.0"),
        ({"rope_type": "yarn"}, "of rope_type 'yarn' takes a factor, got {'rope_type': 'yarn'}"),
        ({"rope_type": "yarn", "factor": 2, "truncate": 1}, r"\.truncate takes true or false"),
        (
            {"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2},
            r"beta_fast takes a number above beta_slow, 2\.0, got 1\.0",
        ),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1},
            "of rope_type 'llama3' takes a high_freq_factor",
        ),
        ([2], r"takes an object or null, got \[2\]"),
        ("yarn", "takes an object or null, got 'yarn'"),
    ],
)
def test_a_rope_that_is_not_computed_is_refused_in_both_families(config, field, rope, message):
    with pytest.raises(ValueError, match=rf"^config\.json: .*{field}.*{message}"):
        read(config | {field: rope})


@BOTH
def test_null_among_the_rope_fields_is_absent(config):
    want = ModelConfig.from_hf_config(config | {"rope_scaling": {"type": "linear", "factor": 2}})
    for nulls in ({"rope_type": None, "type": "linear"}, {"rope_type": "linear", "type": None}):
        for name in ("rope_scaling", "rope_parameters"):
            given = config | {name: nulls | {"factor": 2, "attention_factor": None}}
            assert ModelConfig.from_hf_config(given) == want
    neutral = config | {"rope_scaling": {"rope_type": "default", "factor": 1.0}}
    assert ModelConfig.from_hf_config(neutral).rope_scaling is None


@BOTH
@pytest.mark.parametrize(
    "field, value, neutral",
    [
        ("partial_rotary_factor", 0.5, 1.0),
        ("use_sliding_window", True, False),
        ("is_causal", True, False),
        ("layer_types", ["full_attention", "sliding_attention"], ["full_attention"] * 2),
        ("layer_types", "sliding_attention", None),
        ("layer_types", [{}], None),
        ("attn_logit_softcapping", 50.0, None),
        ("final_logit_softcapping", 30.0, None),
    ],
)
def test_attention_that_is_not_computed_is_refused_in_both_families(config, field, value, neutral):
    want = ModelConfig.from_hf_config(config)
    assert ModelConfig.from_hf_config(config | {field: neutral}) == want
    with pytest.raises(ValueError, match=f"config.json: {field} takes "):
        ModelConfig.from_hf_config(config | {field: value})


@BOTH
def test_rope_fields_that_contradict_each_other_are_refused(config):
    linear = {"rope_type": "linear", "factor": 2.0}
    both = {"rope_scaling": linear, "rope_parameters": linear | {"factor": 4.0}}
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters take one rotary"):
        read(config | both)
    yarn = {"rope_type": "yarn", "factor": 2.0}
    with pytest.raises(ValueError, match="rope_theta takes a number > 1 for yarn, got 1.0"):
        read(config | {"rope_theta": 1, "rope_scaling": yarn})


def test_frequencies_are_those_of_transformers():
    """As transformers 5.24 computes them for theta 100, 8 dimensions, 64 positions, factor 4."""
    recorded = {
        "linear": [0.25, 0.07905694097280502, 0.02500000037252903, 0.007905694656074047],
        "yarn": [1.0, 0.23717081546783447, 0.04999999701976776, 0.007905694656074047],
        "llama3": [1.0, 0.2546479105949402, 0.02546478994190693, 0.007905694656074047],
    }
    for kind, values in recorded.items():
        frequencies = RopeScaling(kind, 4.0, 64).frequencies(100.0, 8)
        torch.testing.assert_close(frequencies, torch.tensor(values), rtol=roundings(3), atol=0)


@BOTH
def test_attention_factor_of_yarn(config):
    def factor(**fields):
        yarn = {"rope_type": "yarn", "factor": 40.0} | fields
        return read(config | {"rope_scaling": yarn}).rope_scaling.attention_factor

    assert factor() == pytest.approx(1.3688879454)  # 1 + ln(40) / 10
    assert factor(attention_factor=1.0) == 1.0
    assert factor(mscale=0.707, mscale_all_dim=0.707) == 1.0  # DeepSeek-V2
    assert factor(mscale=1.0, mscale_all_dim=None) == factor()


@BOTH
def test_context_length_counts_the_stretch_once(config):
    def length(rope):
        model = read(config | {"rope_scaling": rope})
        assert read(model.to_hf_config()) == model
        return model.context_length

    assert length(None) == 64
    assert length({"rope_type": "linear", "factor": 2}) == 128
    yarn = {"rope_type": "yarn", "factor": 4}
    assert length(yarn) == 256
    assert length(yarn | {"original_max_position_embeddings": 16}) == 64
    llama3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    assert length(llama3 | {"original_max_position_embeddings": 8}) == 64


SIZES = {
    "llada": "vocab_size d_model n_layers n_heads n_kv_heads mlp_hidden_size max_sequence_length "
    "embedding_size",
    "dream": "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "intermediate_size max_position_embeddings",
}
WRONG = {
    "size": ["4", 0, -4, 4.0, [4], {}, True, 10**30],
    "number": ["1e-5", 0, -1.0, [1.0], {}, True, float("nan"), float("inf"), 10**400],
    "switch": ["false", 0, 1, [], {}, "true"],
    "id": ["48", -1, 50, 10**30, 48.0, [48.5], ["48"], [[48]], [7, 50], {}, True],
}
FIELDS = [
    *(("llada", name, "size") for name in SIZES["llada"].split()),
    *(("dream", name, "size") for name in SIZES["dream"].split()),
    *((family, name, "number") for family in SIZES for name in ("rope_theta", "rms_norm_eps")),
    *((family, f"{t}_token_id", "id") for family in SIZES for t in ("mask", "eos", "pad")),
    ("llada", "include_qkv_bias", "switch"),
    ("llada", "weight_tying", "switch"),
    ("dream", "tie_word_embeddings", "switch"),
]


@pytest.mark.parametrize(("family", "field", "kind"), FIELDS)
def test_every_field_of_a_config_is_checked(family, field, kind):
    config = {"llada": LLADA, "dream": DREAM}[family]
    for value in WRONG[kind]:
        with pytest.raises(ValueError, match=rf"^config\.json: {field} takes .*, got "):
            read(config | {field: value})


@pytest.mark.parametrize(("family", "field", "kind"), FIELDS)
def test_null_means_absent(family, field, kind):
    config = {"llada": LLADA, "dream": DREAM}[family]
    try:
        wanted = read(without(config, field))
    except ValueError as error:
        with pytest.raises(ValueError) as raised:
            read(config | {field: None})
        assert "is missing" in str(error) and str(raised.value) == str(error)
    else:
        assert read(config | {field: None}) == wanted


@pytest.mark.parametrize("ratio", ["4", 0, [4], 4.5])
def test_mlp_ratio_is_checked_where_it_counts(ratio):
    bare = without(LLADA, "mlp_hidden_size")
    assert read(bare | {"mlp_ratio": 2}).mlp_width == 64
    assert read(bare | {"mlp_ratio": None}).mlp_width == 128
    with pytest.raises(ValueError, match=r"^config\.json: mlp_ratio takes an int .*, got"):
        read(bare | {"mlp_ratio": ratio})
    with pytest.raises(ValueError, match=r"^config\.json: d_model takes an int .*, got {}"):
        read(bare | {"d_model": {}})


@BOTH
@pytest.mark.parametrize(
    ("given", "wanted"),
    [(48, 48), ([48], 48), ([1, 2], (1, 2)), ([2, 1, 2], (2, 1)), ([], None), (None, None)],
)
def test_several_end_ids_are_a_tuple_and_one_is_an_int(config, given, wanted):
    model = read(config | {"eos_token_id": given})
    assert model.eos_id == wanted and type(model.eos_id) is type(wanted)
    assert read(model.to_hf_config()) == model
    for field in ("mask_token_id", "pad_token_id"):
        with pytest.raises(
            ValueError, match=rf"^config\.json: {field} takes an id .*, got \[1, 2\]"
        ):
            read(config | {field: [1, 2]})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLADA | {"alibi": True}, "alibi takes False, got True"),
        (LLADA | {"layer_norm_type": "default"}, "layer_norm_type takes 'rms', got 'default'"),
        (LLADA | {"layer_norm_type": ["rms"]}, r"layer_norm_type takes 'rms', got \['rms'\]"),
        (LLADA | {"block_group_size": 4}, "block_group_size takes 1, got 4"),
        (LLADA | {"include_bias": True}, "include_bias takes False, got True"),
        (LLADA | {"n_layers": None}, "field n_layers is missing"),
        (LLADA | {"n_heads": 3}, r"d_model takes an even multiple of n_heads \(3\), got 32"),
        (LLADA | {"n_kv_heads": 3}, r"n_heads takes a multiple of n_kv_heads \(3\), got 4"),
        (LLADA | {"embedding_size": 49}, r"embedding_size takes at least vocab_size \(50\)"),
        (DREAM | {"hidden_act": "gelu"}, "hidden_act takes 'silu', got 'gelu'"),
        (DREAM | {"head_dim": 16}, "head_dim takes hidden_size / num_attention_heads = 8, got 16"),
        (DREAM | {"use_sliding_window": True}, "use_sliding_window takes False, got True"),
        ({}, "neither d_model .* nor hidden_size"),
    ],
)
def test_what_the_transformer_does_not_compute_is_named(config, message):
    with pytest.raises(ValueError, match=rf"^config\.json: {message}"):
        read(config)


@BOTH
@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_quantised_weights_are_refused(config, field):
    for none in (None, {}):
        assert read(config | {field: none}) == read(config)
    with pytest.raises(ValueError, match=rf"^config\.json: {field} takes None .*'gptq'"):
        read(config | {field: {"quant_method": "gptq", "bits": 4}})


@BOTH
@pytest.mark.parametrize("kind", ["qwen2", "olmo", "llama", "mmada", "", 3, ["llada"], False])
def test_another_model_type_is_refused(config, kind):
    with pytest.raises(ValueError, match=r"^config\.json: model_type takes .*, got "):
        read(config | {"model_type": kind})


def test_model_type_decides_and_the_layout_has_to_follow():
    assert read(LLADA | {"hidden_size": 7}).family == "llada"
    assert read(DREAM | {"d_model": 7}).family == "dream"
    assert read(DREAM | {"model_type": "dream"}).family == "dream"
    with pytest.raises(ValueError, match="field d_model is missing, model_type is 'llada'"):
        read(DREAM | {"model_type": "llada"})
    with pytest.raises(ValueError, match="field hidden_size is missing, model_type is 'Dream'"):
        read(LLADA | {"model_type": "Dream"})


def test_without_model_type_the_class_tells():
    bare = without(DREAM, "model_type")
    assert read(bare).family == "dream"
    assert read(bare | {"architectures": ["DreamModel"]}).family == "dream"
    for classes in (["Qwen2ForCausalLM"], "Qwen2ForCausalLM", ["LLaDAModelLM"]):
        with pytest.raises(ValueError, match=r"model_type takes .*, got None, architectures"):
            read(bare | {"architectures": classes})
    with pytest.raises(ValueError, match="architectures .'OLMoForCausalLM'"):
        read(without(LLADA, "model_type") | {"architectures": ["OLMoForCausalLM"]})


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "lladamoe"},
        {"model_type": "llada2_moe"},
        {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]},
        {"model_type": "llada", "num_experts": 64},
        {"model_type": None, "num_experts": 64},
    ],
)
def test_mixtures_of_experts_are_said_not_to_be_supported(change):
    with pytest.raises(ValueError, match=r"^config\.json: model_type .*LLaDA-MoE.* not supported"):
        read(DREAM | change)


def test_defaults_of_absent_fields():
    small = {k: LLADA[k] for k in ("d_model", "n_heads", "n_layers", "vocab_size")}
    config = read(small)
    assert (config.kv_heads, config.mlp_width, config.embedding_size) == (4, 128, 50)
    assert config.mask_id is None and not config.tied_head


def test_a_shape_that_its_layout_cannot_say_is_refused():
    """Dream's config.json has no field for it: `save_model` would write what cannot be read."""
    shape = {"vocab_size": 50, "width": 32, "layers": 1, "heads": 4, "mlp_width": 48}
    assert (ModelConfig("dream", **shape).qkv_bias, ModelConfig("llada", **shape).qkv_bias) == (
        1,
        0,
    )
    for change in ({"qkv_bias": False}, {"embedding_size": 56}):
        with pytest.raises(
            ValueError, match=rf"ModelConfig: {next(iter(change))} takes .* 'dream'"
        ):
            ModelConfig("dream", **shape, **change)
        config = ModelConfig("llada", **shape, **change)
        assert ModelConfig.from_hf_config(config.to_hf_config()) == config
