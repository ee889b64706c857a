# SPDX-License-Identifier: Apache-2.0
"""What the integrations share, where no engine is installed: options, slots, a plugin."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys

import pytest
import torch

from r2dllm_ext import DecodeConfig
from r2dllm_ext.integrations import rules
from r2dllm_ext.integrations._slots import BlockSlots

CPU = torch.device("cpu")


def test_importing_the_package_imports_no_engine():
    code = "import r2dllm_ext.integrations, sys; print('sglang' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rules.PRESETS)
def test_presets(name):
    config = getattr(DecodeConfig, name)(3, quota=2)
    assert rules.named_config("here", rules.PRESETS, 3, {"rules": name, "quota": 2}) == config


def test_the_first_rules_are_the_default():
    assert rules.named_config("here", rules.PRESETS, 3, {}) == DecodeConfig.r2(3)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"rules": "r3"}, "here: rules takes one of .*, got 'r3'"),
        ({"rules": ["r2"]}, r"here: rules takes one of .*, got \['r2'\]"),
        ({"treshold": 0.9}, "here: an option takes one of rules, base, .*, got 'treshold'"),
        ({"mask_id": 3}, "here: an option takes one of rules, base, .*, got 'mask_id'"),
        ({"min_p": 2}, "DecodeConfig: min_p takes a number .*, got 2"),
        ({"token_cluster": False}, "DecodeConfig: token_cluster takes one of .*, got False"),
    ],
)
def test_bad_options(options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        rules.named_config("here", rules.PRESETS, 3, options)


# ---- slots -------------------------------------------------------------------------------------


def test_slots_follow_their_blocks():
    slots = BlockSlots(4, 2, {"answer": ("cells", torch.bool), "edits": ("block", torch.int32)})
    blocks = [slots.new_block() for _ in range(2)]
    given, fresh = slots.of(blocks, CPU)
    assert given.tolist() == fresh.slots.tolist() == [0, 1]
    assert fresh.rows.tolist() == [0, 1]
    slots.state.streak_count[given] = torch.tensor([[5], [6]], dtype=torch.int32)
    slots["edits"][given] = torch.tensor([7, 8], dtype=torch.int32)
    slots["answer"][given] = True

    blocks = [blocks[1], slots.new_block(), blocks[0], slots.new_block()]  # more than there are
    given, fresh = slots.of(blocks, CPU)
    assert fresh.rows.tolist() == [1, 3]
    assert slots.state.rows == 4
    assert slots.state.streak_count[given, 0].tolist() == [6, 0, 5, 0]
    assert slots.state.counters[:, 0].tolist() == [0, 1, 2, 3]  # no two rows draw alike
    assert slots["edits"][given].tolist() == [8, 0, 7, 0]
    assert slots["answer"][given].any(1).tolist() == [True, False, True, False]
    again, fresh = slots.of(blocks, CPU)
    assert fresh is None
    assert again is given  # nothing is copied to the device while the batch stays


def test_a_dropped_block_leaves_a_clean_slot():
    slots = BlockSlots(4, 1, {"edits": ("block", torch.int32)})
    blocks = [slots.new_block()]
    given, _ = slots.of(blocks, CPU)
    slots["edits"][given] = 3
    slots.state.streak_count[given] = 3
    blocks = [slots.new_block()]
    gc.collect()
    given, fresh = slots.of(blocks, CPU)
    assert given.tolist() == fresh.slots.tolist() == [0]
    assert slots.state.rows == 1
    assert not slots["edits"].any() and not slots.state.streak_count.any()


# ---- SGLang's plugin ---------------------------------------------------------------------------


def test_the_plugin_waits_for_the_registry(tmp_path, monkeypatch):
    """A registry of that name, imported after `register`, gets the algorithms; once."""
    plugin = importlib.import_module("r2dllm_ext.integrations._sglang_plugin")
    (tmp_path / "registry_of_test.py").write_text("algo_name_to_cls = {'LowConfidence': 1}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugin, "_REGISTRY", "registry_of_test")
    monkeypatch.setattr(plugin, "require", lambda engine: "0.5.23")
    added = []
    monkeypatch.setattr(plugin, "_add", added.append)
    before = list(sys.meta_path)
    plugin.register()
    plugin.register()
    assert len(sys.meta_path) == len(before) + 1
    assert added == []
    registry = importlib.import_module("registry_of_test")
    assert registry.algo_name_to_cls == {"LowConfidence": 1}
    assert added == [registry]
    assert sys.meta_path == before
    plugin.register()  # where it has been imported already
    assert added == [registry, registry]
    del sys.modules["registry_of_test"]
