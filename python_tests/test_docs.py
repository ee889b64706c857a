# SPDX-License-Identifier: Apache-2.0
"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import r2dllm_ext
from r2dllm_ext.integrations._versions import ENGINES, installed_version

NAMES = {name: getattr(r2dllm_ext, name) for name in r2dllm_ext.__all__} | {"torch": torch}


def modules():
    walk = pkgutil.walk_packages(r2dllm_ext.__path__, "r2dllm_ext.")
    return [m.name for m in walk if not m.name.endswith(("__main__", "_C"))]


@pytest.mark.parametrize("name", modules())
def test_examples(name):
    engine = name.removeprefix("r2dllm_ext.integrations.")
    if engine in ENGINES and installed_version(engine) is None:
        pytest.skip(f"{engine} is not installed")
    result = doctest.testmod(importlib.import_module(name), extraglobs=NAMES)
    assert result.failed == 0


def test_public_names_are_documented():
    undocumented = [
        name
        for name in r2dllm_ext.__all__
        if name != "__version__" and not (getattr(r2dllm_ext, name).__doc__ or "").strip()
    ]
    assert undocumented == []


def test_readme_examples(capsys):
    readme = Path(__file__).parent.parent / "README.md"
    if not readme.exists():
        pytest.skip("needs the source tree beside the tests")
    text = readme.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    printed = text[text.index("```text\n") + len("```text\n") :].partition("```")[0]
    assert capsys.readouterr().out == printed
    assert not (scope["x"] == scope["model"].mask_id).any()
    assert scope["out"].nfe < 96
    assert scope["hidden"].grad.shape == scope["hidden"].shape


def test_readme_has_two_commands():
    """What a stranger types, and what CI runs (.ci/run)."""
    readme = Path(__file__).parent.parent / "README.md"
    if not readme.exists():
        pytest.skip("needs the source tree beside the tests")
    start = readme.read_text().partition("\n## Quick start\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```", start, re.DOTALL | re.MULTILINE)
    assert [block.splitlines()[-1] for block in blocks] == ["r2dllm demo", ".ci/check"]
