# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of both published layouts, against a plain reimplementation of the published math."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from r2dllm_ext.models import ModelConfig, Transformer, checkpoint, load_model, save_model

LLADA = {
    "model_type": "llada", "d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2,
    "mlp_hidden_size": 48, "vocab_size": 50, "embedding_size": 56, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "mask_token_id": 49, "eos_token_id": 48, "weight_tying": False,
    "layer_norm_type": "rms", "block_group_size": 1, "alibi": False, "max_sequence_length": 64,
}  # fmt: skip
DREAM = {
    "model_type": "Dream", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 50, "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "mask_token_id": 49, "eos_token_id": 48, "hidden_act": "silu",
    "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip
VARIANTS = {
    "llada": LLADA,
    "llada-gqa": LLADA | {"n_kv_heads": 2},
    "llada-tied": LLADA | {"weight_tying": True},
    "llada-bias": LLADA | {"include_qkv_bias": True},
    "dream": DREAM,
    "dream-tied": DREAM | {"tie_word_embeddings": True},
}


def random_weights(config: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Published keys and shapes, written down from the specification."""
    draw = torch.Generator().manual_seed(0)

    def matrix(rows, columns):
        return (torch.randn(rows, columns, generator=draw) * 0.3).to(dtype)

    def vector(size, base):
        return (base + torch.randn(size, generator=draw) * 0.3).to(dtype)

    if "d_model" in config:
        d, mlp = config["d_model"], config["mlp_hidden_size"]
        kv = d // config["n_heads"] * config["n_kv_heads"]
        rows = config["embedding_size"]
        weights = {"model.transformer.wte.weight": matrix(rows, d)}
        weights["model.transformer.ln_f.weight"] = vector(d, 1)
        if not config["weight_tying"]:
            weights["model.transformer.ff_out.weight"] = matrix(rows, d)
        for n in range(config["n_layers"]):
            block = {"attn_norm": vector(d, 1), "ff_norm": vector(d, 1)}
            block |= {"q_proj": matrix(d, d), "k_proj": matrix(kv, d), "v_proj": matrix(kv, d)}
            block |= {"attn_out": matrix(d, d), "ff_out": matrix(d, mlp)}
            block |= {"ff_proj": matrix(mlp, d), "up_proj": matrix(mlp, d)}
            weights |= {f"model.transformer.blocks.{n}.{k}.weight": w for k, w in block.items()}
            if config.get("include_qkv_bias"):
                for name, size in (("q", d), ("k", kv), ("v", kv)):
                    weights[f"model.transformer.blocks.{n}.{name}_proj.bias"] = vector(size, 0)
        return weights
    d, mlp, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    weights = {"model.embed_tokens.weight": matrix(rows, d), "model.norm.weight": vector(d, 1)}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(rows, d)
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}."
        for name, size in (("q", d), ("k", kv), ("v", kv)):
            weights[f"{at}self_attn.{name}_proj.weight"] = matrix(size, d)
            weights[f"{at}self_attn.{name}_proj.bias"] = vector(size, 0)
        weights[f"{at}self_attn.o_proj.weight"] = matrix(d, d)
        weights[f"{at}mlp.gate_proj.weight"] = matrix(mlp, d)
        weights[f"{at}mlp.up_proj.weight"] = matrix(mlp, d)
        weights[f"{at}mlp.down_proj.weight"] = matrix(d, mlp)
        weights[f"{at}input_layernorm.weight"] = vector(d, 1)
        weights[f"{at}post_attention_layernorm.weight"] = vector(d, 1)
    return weights


def plain_logits(config: dict, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, rows] of one sequence [T] in float64: loops over heads, rotation by complex
    numbers, softmax spelled out, no cache."""
    w = {key: value.double() for key, value in weights.items()}
    if "d_model" in config:
        width, heads, kv_heads = config["d_model"], config["n_heads"], config["n_kv_heads"]
        layers, stem = config["n_layers"], "model.transformer.blocks.{}."
        outer = ("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out")
        inner = "attn_norm q_proj k_proj v_proj attn_out ff_norm ff_proj up_proj ff_out".split()
    else:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
        stem, outer = "model.layers.{}.", ("model.embed_tokens", "model.norm", "lm_head")
        inner = (
            "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
            "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
        ).split()
    D, T = width // heads, len(ids)

    def norm(x, key):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[key]

    def linear(x, key):
        return x @ w[key + ".weight"].T + w.get(key + ".bias", 0)

    frequency = config["rope_theta"] ** (-torch.arange(0, D, 2).double() / D)
    turn = torch.polar(torch.ones(T, D // 2).double(), torch.arange(T)[:, None] * frequency)

    def rotate(x):
        z = torch.complex(x[:, : D // 2], x[:, D // 2 :]) * turn
        return torch.cat((z.real, z.imag), dim=1)

    x = w[outer[0] + ".weight"][ids]
    for n in range(layers):
        norm1, q_key, k_key, v_key, o_key, norm2, gate, up, down = (
            stem.format(n) + name for name in inner
        )
        h = norm(x, norm1 + ".weight")
        q, k, v = linear(h, q_key), linear(h, k_key), linear(h, v_key)
        mixed = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            mine, shared = slice(head * D, head * D + D), slice(group * D, group * D + D)
            scores = rotate(q[:, mine]) @ rotate(k[:, shared]).T / D**0.5
            share = scores.exp() / scores.exp().sum(-1, keepdim=True)
            mixed.append(share @ v[:, shared])
        x = x + linear(torch.cat(mixed, dim=1), o_key)
        h = norm(x, norm2 + ".weight")
        g = linear(h, gate)
        x = x + linear(g / (1 + (-g).exp()) * linear(h, up), down)
    x = norm(x, outer[1] + ".weight")
    return x @ w.get(outer[2] + ".weight", w[outer[0] + ".weight"]).T


def write(folder, config, weights, shards: int = 1):
    """A checkpoint folder as published: one file, or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    where = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[i::shards])
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_loaded_forward_equals_the_plain_one(tmp_path, name, shards):
    config = VARIANTS[name]
    weights = random_weights(config)
    model = load_model(write(tmp_path / "m", config, weights, shards))
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    logits = model(ids).logits
    wanted = torch.stack([plain_logits(config, weights, row) for row in ids])
    assert wanted.std() > 0.5, "a model that says nothing compares equal to anything"
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-4, atol=1e-4)
    assert not model.training and (model.mask_id, model.eos_id, model.vocab_size) == (49, 48, 50)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_checkpoints_unless_asked(tmp_path, stored):
    folder = write(tmp_path, DREAM, random_weights(DREAM, stored))
    assert {p.dtype for p in load_model(folder).parameters()} == {stored}
    wide = load_model(folder, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert wide.rotary.cos.dtype == torch.float32
    with pytest.raises(TypeError, match="dtype is torch.int8"):
        load_model(folder, dtype=torch.int8)


@pytest.mark.parametrize("size", [10**9, 20_000])
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_is_exact(tmp_path, name, size):
    weights = random_weights(VARIANTS[name])
    model = load_model(write(tmp_path / "a", VARIANTS[name], weights))
    save_model(model, tmp_path / "b", max_shard_size=size)
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert (len(files) > 1) == (size < 10**9)
    saved = {key: w for file in files for key, w in load_file(file).items()}
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], weights[key]) for key in weights)
    again = load_model(tmp_path / "b")
    assert again.config == model.config
    for mine, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_saving_anew_leaves_no_stale_shard(tmp_path):
    model = load_model(write(tmp_path / "a", LLADA, random_weights(LLADA)))
    for size in (20_000, 40_000, 10**9, 20_000):
        save_model(model, tmp_path / "b", max_shard_size=size)
        load_model(tmp_path / "b")
        single = size == 10**9
        assert (tmp_path / "b" / "model.safetensors").exists() == single
        assert (tmp_path / "b" / "model.safetensors.index.json").exists() != single
    assert not list((tmp_path / "b").glob("*.part"))
    with pytest.raises(ValueError, match="max_shard_size is 0"):
        save_model(model, tmp_path / "b", max_shard_size=0)


def test_saving_over_the_source_is_safe(tmp_path):
    weights = random_weights(LLADA)
    model = load_model(write(tmp_path, LLADA, weights))
    save_model(model, tmp_path)
    assert torch.equal(model.embed.weight, weights["model.transformer.wte.weight"])


def test_wrong_keys_and_shapes_name_key_file_and_shapes(tmp_path):
    weights = random_weights(LLADA)
    key = "model.transformer.blocks.1.ff_out.weight"
    less = {k: w for k, w in weights.items() if k != key}
    with pytest.raises(ValueError, match=rf"key {key} \[32, 48\] is missing from .*less"):
        load_model(write(tmp_path / "less", LLADA, less))
    more = weights | {"model.transformer.wpe.weight": torch.zeros(3, 2)}
    message = r"unexpected key model.transformer.wpe.weight \[3, 2\] in .*model.safetensors"
    with pytest.raises(ValueError, match=message):
        load_model(write(tmp_path / "more", LLADA, more))
    bent = weights | {key: torch.zeros(32, 47)}
    message = rf"key {key} in .*model.safetensors has shape \[32, 47\].*asks for \[32, 48\]"
    with pytest.raises(ValueError, match=message):
        load_model(write(tmp_path / "bent", LLADA, bent))
    whole = weights | {key: torch.zeros(32, 48, dtype=torch.int64)}
    with pytest.raises(ValueError, match=rf"key {key} in .* is stored as I64"):
        load_model(write(tmp_path / "whole", LLADA, whole))


def test_broken_folders_say_what_is_broken(tmp_path):
    weights = random_weights(DREAM)
    folder = write(tmp_path / "shards", DREAM, weights, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors, which does not"):
        load_model(folder)
    index = folder / "model.safetensors.index.json"
    liar = json.loads(index.read_text())
    liar["weight_map"] = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    index.write_text(json.dumps(liar))
    with pytest.raises(ValueError, match=r"key .* is missing from .*model-00001-of-00002"):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_model(folder)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        load_model(folder)
    for damaged in (b"", b"not safetensors at all", bytes(64)):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
            load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_model(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLADA | {"alibi": True}, "alibi is True, supported: False"),
        (LLADA | {"layer_norm_type": "default"}, "layer_norm_type is 'default', supported: 'rms'"),
        (LLADA | {"block_group_size": 4}, "block_group_size is 4, supported: 1"),
        (LLADA | {"rope_scaling": {"type": "ntk"}}, "rope_scaling is {'type': 'ntk'}"),
        (LLADA | {"include_bias": True}, "include_bias is True"),
        (LLADA | {"n_layers": None}, "field n_layers is missing"),
        (DREAM | {"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'silu'"),
        (DREAM | {"rope_scaling": {"factor": 2}}, "rope_scaling is {'factor': 2}"),
        (DREAM | {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        (DREAM | {"head_dim": 16}, "head_dim is 16, supported: 8"),
        ({"model_type": "t5"}, "neither d_model .* nor hidden_size"),
    ],
)
def test_unsupported_configs_name_field_and_value(config, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf_config(config)


def test_defaults_of_absent_fields():
    small = {k: LLADA[k] for k in ("d_model", "n_heads", "n_layers", "vocab_size")}
    config = ModelConfig.from_hf_config(small)
    assert (config.kv_heads, config.mlp_width, config.embedding_size) == (4, 128, 50)
    assert config.mask_id is None and not config.tied_head
    nested = {k: v for k, v in DREAM.items() if k != "rope_theta"}
    nested["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert ModelConfig.from_hf_config(nested) == ModelConfig.from_hf_config(DREAM)


def test_hub_id_goes_through_snapshot_download(tmp_path, monkeypatch):
    import huggingface_hub

    folder = write(tmp_path / "cache", DREAM, random_weights(DREAM))
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert load_model("someone/some-model").config.family == "dream"
    assert asked[0][0] == "someone/some-model"
    assert "*.safetensors" in asked[0][1]["allow_patterns"]

    def refuse(repo_id, **options):
        raise OSError("404 not found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="'some/one' is neither .* 404 not found"):
        load_model("some/one")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install 'r2dllm_ext\\[hub\\]'"):
        load_model("some/one")
    with pytest.raises(FileNotFoundError, match="no folder '/no/such/folder'"):
        load_model("/no/such/folder")


def test_missing_safetensors_is_explained(tmp_path, monkeypatch):
    write(tmp_path, DREAM, random_weights(DREAM))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install .r2dllm_ext\[models\]"):
        load_model(tmp_path)


def test_every_parameter_has_its_own_key():
    for config in (LLADA | {"include_qkv_bias": True}, DREAM):
        with torch.device("meta"):
            model = Transformer(ModelConfig.from_hf_config(config))
        names = [name for name, _ in model.named_parameters()]
        keys = {checkpoint.published_key(model.config.family, name) for name in names}
        assert keys == random_weights(config).keys()


PEAK = """
import re, sys
import torch
from r2dllm_ext.models import load_model

def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

resident = kib("VmRSS")
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((kib("VmHWM") - resident) * 1024, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_never_holds_the_weights_twice(tmp_path, dtype):
    config = LLADA | {"d_model": 512, "n_layers": 5, "mlp_hidden_size": 1536}
    write(tmp_path, config, random_weights(config))
    command = [sys.executable, "-c", PEAK, str(tmp_path), dtype]
    grown, weights = map(int, subprocess.check_output(command).split()[-2:])
    assert weights > 30e6
    assert grown < 1.2 * weights + 8e6, f"grew by {grown / weights:.2f} x the weights"
