# SPDX-License-Identifier: Apache-2.0
"""The engines' table: versions and their errors, the command that prints it, the README."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from contracts import HERE

import r2dllm_ext.integrations
from r2dllm_ext.integrations._lines import USES, status
from r2dllm_ext.integrations._versions import ENGINES, installed_version, require

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def versions(monkeypatch):
    """Packages and their versions, in place of those that are installed."""
    found: dict[str, str] = {}

    def version(package: str) -> str:
        if package not in found:
            raise metadata.PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(metadata, "version", version)
    return found


@pytest.fixture
def no_module(monkeypatch):
    """Neither dInfer nor dllm-plugin can be found."""
    for name in ("dinfer", "dllm_plugin"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(Path(r2dllm_ext.__file__).parent.parent)])


def test_every_integration_has_its_lines():
    modules = {module.name for module in pkgutil.iter_modules(r2dllm_ext.integrations.__path__)}
    assert {name for name in modules if name[0] != "_"} - {"rules"} == set(USES)
    assert set(ENGINES) <= set(USES)
    assert {name for name in USES if name not in ENGINES} == {
        name for name, use in USES.items() if use.commit
    }


def test_an_engine_is_a_small_file():
    for name in USES:
        path = Path(r2dllm_ext.integrations.__path__[0]) / f"{name}.py"
        assert len(path.read_text().splitlines()) < 150, name


def test_ci_runs_engines_that_it_knows():
    folder = README.parent / ".ci"
    if not folder.exists():
        pytest.skip("needs the source tree beside the tests")
    (names,) = re.findall(r"^exec \.ci/engines (.+)$", (folder / "run").read_text(), re.MULTILINE)
    known = set(re.findall(r"^    (\w+)\)", (folder / "engines").read_text(), re.MULTILINE))
    assert set(names.split()) == {"diffusers", "transformers", "lmdeploy"} <= known
    for name in known:
        assert name in ENGINES and Path(__file__).with_name(f"test_{name}.py").exists()


def test_the_readme_has_the_table():
    if not README.exists():
        pytest.skip("needs the source tree beside the tests")
    section = README.read_text().partition("\n## Engines\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    want = [
        f"| {use.name} | `{use.lines[0]}`<br>`{use.lines[1]}` | {use.faster} |"
        for use in USES.values()
    ]
    assert rows == want


def test_lines_name_what_exists():
    """Names that a line imports from an integration of this tree; and the lines can be parsed."""
    for engine, use in USES.items():
        if not use.lines[0].startswith("from "):
            continue
        statement = ast.parse(use.lines[0]).body[0]
        ast.parse(use.lines[1].replace(", ...)", ")"))
        path = Path(r2dllm_ext.integrations.__path__[0]) / f"{engine}.py"
        if statement.module == "r2dllm_ext.integrations":
            assert [alias.name for alias in statement.names] == [engine]
        elif path.exists():
            assert statement.module == f"r2dllm_ext.integrations.{engine}"
            defined = {getattr(node, "name", None) for node in ast.parse(path.read_text()).body}
            assert {alias.name for alias in statement.names} <= defined


def test_the_command(run):
    result = run("engines")
    assert (result.status, result.err) == (0, "")
    want = []
    for engine, use in USES.items():
        want += [f"{use.name}: {status(engine)}", *(f"    {line}" for line in use.lines)]
    assert result.out.splitlines() == want


def test_the_command_imports_no_engine():
    code = (
        "import sys; from r2dllm_ext.cli import main; main(['engines']); "
        f"print(sorted(set(sys.modules) & {set(ENGINES) | {'vllm'}}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_status(versions, no_module):
    assert status("lmdeploy") == "not installed; tested with lmdeploy 0.18.0"
    versions.update(lmdeploy="0.18.0", diffusers="0.42.0", sglang="0.6.0")
    assert status("lmdeploy") == "lmdeploy 0.18.0, as tested"
    assert status("diffusers") == "diffusers 0.42.0 is taken; tested with 0.42.1"
    assert status("sglang") == "sglang 0.6.0 is refused; tested with 0.5.23"
    assert status("dinfer") == "not installed; tested with dinfer fce4e32"


def test_a_repository_is_known_by_its_module(versions, no_module):
    """A package of this name without the module is another one."""
    versions["dinfer"] = "0.1.0"
    assert installed_version("dinfer") is None
    sys.path.append(str(HERE))
    assert installed_version("dinfer") == require("dinfer") == "0.1.0"
    del versions["dinfer"]
    assert installed_version("dinfer") == require("dinfer") == ""
    unknown = "is installed, of which commit no version tells; tested at fce4e32"
    assert status("dinfer") == f"dinfer {unknown}"


@pytest.mark.parametrize("engine", ["lmdeploy", "dinfer", "dllm_plugin"])
def test_missing_engines_are_one_error(versions, no_module, engine):
    name = f"r2dllm_ext.integrations.{engine}"
    loaded = sys.modules.pop(name, None)
    try:
        with pytest.raises(ImportError) as error:
            importlib.import_module(name)
    finally:
        if loaded is not None:
            sys.modules[name] = loaded
    row = ENGINES[engine]
    source = f"git+https://github.com/{row.repository}@{row.tested}"
    assert str(error.value) == (
        f"{name} was tested with {row.package} {row.tested}, but {row.package} is not installed. "
        f"Fix: pip install '{source if row.repository else f'{row.package}=={row.tested}'}'"
    )


def test_other_versions_are_one_error(versions):
    versions["lmdeploy"] = "0.19.0"
    message = "was tested with lmdeploy 0.18.0, but lmdeploy 0.19.0 is installed. Fix: pip install"
    with pytest.raises(ImportError, match=re.escape(message)):
        require("lmdeploy")
