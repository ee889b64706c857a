# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of both published layouts, against a plain reimplementation of the published math."""

import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import DREAM, LLADA, VARIANTS, plain_logits, random_weights, write
from safetensors.torch import load_file

from r2dllm_ext.models import ModelConfig, Transformer, checkpoint, load_model, save_model


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
    # In float32 sums of some hundred terms a layer; in float64 the tables of the rotation alone are
    # float32, angles of up to 19 radians 2^-20 off, of which the layers make some.
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-4, atol=1e-4)
    wide = load_model(tmp_path / "m").double()
    torch.testing.assert_close(wide(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert not model.training and (model.mask_id, model.eos_id, model.vocab_size) == (49, 48, 50)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_checkpoints_unless_asked(tmp_path, stored):
    folder = write(tmp_path, DREAM, random_weights(DREAM, stored))
    assert {p.dtype for p in load_model(folder).parameters()} == {stored}
    wide = load_model(folder, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert wide.rotary.cos.dtype == torch.float32
    with pytest.raises(TypeError, match="dtype takes .*, got torch.int8"):
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


@pytest.mark.skipif(os.name != "posix", reason="files have modes on POSIX")
@pytest.mark.parametrize("size", [10**9, 20_000])
def test_weights_are_as_readable_as_the_config(tmp_path, size):
    """safetensors 0.8 writes files that the owner alone may read, whatever the umask says."""
    umask = os.umask(0o027)
    try:
        model = load_model(write(tmp_path / "a", LLADA, random_weights(LLADA)))
        save_model(model, tmp_path / "b", max_shard_size=size)
    finally:
        os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "b").iterdir()} == {0o640}


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_a_tied_head_may_be_stored_as_well_if_it_is_the_embedding(tmp_path, name):
    config = VARIANTS[f"{name}-tied"]
    weights = random_weights(config)
    embed, head = (checkpoint.published_key(name, f"{n}.weight") for n in ("embed", "head"))
    twice = weights | {head: weights[embed].clone()}
    for shards in (1, 2):
        model = load_model(write(tmp_path / f"twice{shards}", config, twice, shards))
        assert model.head is None and torch.equal(model.lm_head_weight, weights[embed])
    # Values count, not how they are stored; and every row counts.
    narrow = weights[embed].bfloat16()
    load_model(write(tmp_path / "mixed", config, weights | {embed: narrow.float(), head: narrow}))
    for row, delta in ((0, 1e-3), (-1, torch.nan)):
        other = twice[head].clone()
        other[row, 3] += delta
        with pytest.raises(ValueError, match=rf"key {head} in .* takes the values of {embed}"):
            load_model(write(tmp_path / "other", config, weights | {head: other}))
    short = weights | {head: twice[head][:-1].clone()}
    with pytest.raises(ValueError, match=rf"key {head} in .* takes shape"):
        load_model(write(tmp_path / "short", config, short))


@pytest.mark.parametrize(
    ("rename", "hint"),
    [
        (lambda key: "_orig_mod." + key, "have the prefix '_orig_mod.' too many"),
        (lambda key: "model." + key, "have the prefix 'model.' too many"),
        (lambda key: "module." + key, "have the prefix 'module.' too many"),
        (lambda key: "base_model.model." + key, "have the prefix 'base_model.model.' too many"),
        (lambda key: key.replace("model.", "model._orig_mod.", 1), "have '_orig_mod.' too many"),
        (lambda key: key.removeprefix("model."), "lack the prefix 'model.'"),
    ],
    ids=["compiled", "doubled", "ddp", "peft", "compiled inside", "base model"],
)
@pytest.mark.parametrize("config", [LLADA, DREAM], ids=["llada", "dream"])
def test_keys_under_another_prefix_name_first_key_count_and_prefix(tmp_path, config, rename, hint):
    weights = random_weights(config)
    renamed = {rename(key): weight for key, weight in weights.items()}
    missing = [key for key in weights if key not in renamed]
    first = "model.transformer.wte.weight" if config is LLADA else "model.embed_tokens.weight"
    message = rf"key {first} \[.*\] is missing .*the first of {len(missing)}\): .* seem to {hint}"
    with pytest.raises(ValueError, match=message):
        load_model(write(tmp_path, config, renamed))


def test_missing_and_unexpected_keys_come_in_order_and_counted(tmp_path):
    weights = random_weights(DREAM)
    less = {k: w for k, w in weights.items() if ".self_attn.k_proj." not in k}
    first = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=rf"key {first} .* is missing .*the first of 4\)$"):
        load_model(write(tmp_path / "less", DREAM, less))
    more = {f"model.layers.{n}.self_attn.q_norm.weight": torch.ones(8) for n in range(2)}
    message = r"unexpected key model.layers.0.self_attn.q_norm.weight \[8\] in .*one of 2"
    with pytest.raises(ValueError, match=message):
        load_model(write(tmp_path / "more", DREAM, weights | more))


@pytest.mark.parametrize("config", [LLADA, DREAM], ids=["llada", "dream"])
def test_buffers_of_the_rotary_embedding_are_not_read(tmp_path, config):
    weights = random_weights(config)
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.rotary_emb.inv_freq": torch.zeros(4),
        "model.transformer.blocks.1.rotary_emb.cos_cached": torch.zeros(64, 8),
        "model.layers.0.self_attn.inv_freq": torch.zeros(4),
    }
    model = load_model(write(tmp_path / "a", config, weights | buffers, shards=2))
    ids = torch.arange(20)[None]
    plain = load_model(write(tmp_path / "b", config, weights))
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "[]"),
        ("config.json", "null"),
        ("config.json", '"llada"'),
        ("generation_config.json", "[1]"),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", "0"),
    ],
)
def test_files_that_hold_no_object_are_named(tmp_path, name, words):
    config = DREAM | {"eos_token_id": None}  # so that generation_config.json is read
    folder = write(tmp_path, config, random_weights(config), shards=2)
    (folder / name).write_text(words)
    with pytest.raises(ValueError, match=rf"load_model: .*{name} takes a JSON object, got"):
        load_model(folder)


@pytest.mark.parametrize(
    "data", ["{}".encode("utf-16"), b'{"\xff": 1}', b"[" * 100_000], ids=["utf-16", "byte", "deep"]
)
def test_files_that_are_no_json_are_named(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"load_model: .*config\.json is not JSON"):
        load_model(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_config(tmp_path):
    folder = write(tmp_path, DREAM, random_weights(DREAM))
    plain = load_model(folder).config
    (folder / "config.json").write_text(json.dumps(DREAM), encoding="utf-8-sig")
    assert load_model(folder).config == plain


@pytest.mark.parametrize("where", [None, [], "model.safetensors"])
def test_a_weight_map_that_is_no_object_is_refused(tmp_path, where):
    folder = write(tmp_path, DREAM, random_weights(DREAM), shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=r"index\.json has no weight_map, an object"):
        load_model(folder)


@pytest.mark.parametrize("file", [3, None, ["a"], "", ".", "../a.safetensors", "/a.safetensors"])
def test_a_weight_map_names_files_beside_it(tmp_path, file):
    folder = write(tmp_path, DREAM, random_weights(DREAM), shards=2)
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"] | {"lm_head.weight": file}
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=r"weight_map of .*index\.json takes .* lm_head\.weight"):
        load_model(folder)


@pytest.mark.parametrize("config", [LLADA, DREAM], ids=["llada", "dream"])
def test_a_config_that_is_refused_is_named_by_its_path(tmp_path, config):
    folder = write(tmp_path, config | {"vocab_size": "50"}, random_weights(config))
    message = rf"load_model: {folder}/config\.json: vocab_size takes an int .*, got '50'"
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_token_ids_of_generation_config_fill_what_config_lacks(tmp_path):
    lacking = {k: v for k, v in DREAM.items() if k not in ("eos_token_id", "mask_token_id")}
    folder = write(tmp_path, lacking, random_weights(DREAM))
    assert (load_model(folder).eos_id, load_model(folder).mask_id) == (None, None)
    ids = {"eos_token_id": [7, 48], "mask_token_id": 49, "pad_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    model = load_model(folder)
    assert (model.eos_id, model.mask_id, model.config.pad_id) == ((7, 48), 49, None)
    save_model(model, tmp_path / "again")
    assert load_model(tmp_path / "again").config == model.config
    (folder / "config.json").write_text(json.dumps(DREAM))
    assert load_model(folder).eos_id == 48
    (folder / "config.json").write_text(json.dumps(lacking))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 50]}))
    message = r"generation_config\.json: eos_token_id takes .*\[0, 50\).*, got \[7, 50\]"
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_weights_loaded_under_inference_mode_can_be_trained(tmp_path):
    folder = write(tmp_path, DREAM, random_weights(DREAM))
    with torch.inference_mode():
        model = load_model(folder)
    model(torch.arange(20)[None]).logits.sum().backward()
    assert model.embed.weight.grad is not None


def test_saving_anew_leaves_no_stale_shard(tmp_path):
    model = load_model(write(tmp_path / "a", LLADA, random_weights(LLADA)))
    for size in (20_000, 40_000, 10**9, 20_000):
        save_model(model, tmp_path / "b", max_shard_size=size)
        load_model(tmp_path / "b")
        single = size == 10**9
        assert (tmp_path / "b" / "model.safetensors").exists() == single
        assert (tmp_path / "b" / "model.safetensors.index.json").exists() != single
    assert not list((tmp_path / "b").glob("*.part"))
    with pytest.raises(ValueError, match="max_shard_size takes .*, got 0"):
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
    message = rf"key {key} in .*model.safetensors takes shape \[32, 48\].*got \[32, 47\]"
    with pytest.raises(ValueError, match=message):
        load_model(write(tmp_path / "bent", LLADA, bent))
    whole = weights | {key: torch.zeros(32, 48, dtype=torch.int64)}
    with pytest.raises(ValueError, match=rf"key {key} in .* takes a dtype .* got I64"):
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
    wanted = asked[0][1]["allow_patterns"]
    assert {"*.safetensors", "config.json", "generation_config.json"} <= set(wanted)

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
import torch._dynamo  # what the first rotary tables bring along, more than these weights
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


def test_arguments_of_the_wrong_kind_are_named(tmp_path):
    model = load_model("ledger")
    wrong = [
        (lambda: load_model(3), TypeError, "load_model: path_or_hub_id takes"),
        (lambda: load_model(None), TypeError, "load_model: path_or_hub_id takes"),
        (lambda: load_model(""), FileNotFoundError, "load_model: no folder ''"),
        (lambda: load_model("ledger", device="gpu"), ValueError, "load_model: device takes"),
        (lambda: load_model("ledger", device=1.5), TypeError, "load_model: device takes"),
        (lambda: save_model(3, tmp_path), TypeError, "save_model: model takes"),
        (lambda: save_model(model, tmp_path, max_shard_size="5GB"), TypeError, "max_shard_size"),
        (lambda: save_model(model, tmp_path, max_shard_size=1e9), TypeError, "max_shard_size"),
    ]
    for call, error, words in wrong:
        with pytest.raises(error, match=words):
            call()
