# SPDX-License-Identifier: Apache-2.0
"""Which versions of an engine its integration was tested with, and the one error for all others.

Nothing is imported to find a version: it is read from what the package's installation left.
"""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple


class Engine(NamedTuple):
    """A package that an integration is written for."""

    package: str  # its name for pip
    tested: str  # the version that its tests were run with
    series: str  # versions that begin so are taken: those that promise the same interface
    # Where there are no releases, `tested` is a commit of this repository, which no version tells,
    # and whatever has the module that the integration builds on is taken.
    repository: str = ""
    module: str = ""


ENGINES = MappingProxyType(
    {
        # Its algorithms are no public interface: another release may have another base class.
        "sglang": Engine("sglang", "0.5.23", "0.5.23"),
        # 0.43 gives schedulers another `step` (pull request 14741).
        "diffusers": Engine("diffusers", "0.42.1", "0.42"),
        # What `generate` hands to a callable changes between minor releases.
        "transformers": Engine("transformers", "5.24.0", "5.24"),
        # Its strategies for dLLMs are no public interface either.
        "lmdeploy": Engine("lmdeploy", "0.18.0", "0.18.0"),
        # The package index has another package under this name, without the module.
        "dinfer": Engine(
            "dinfer", "fce4e32", "", "inclusionAI/dInfer", "dinfer.decoding.parallel_strategy"
        ),
        "dllm_plugin": Engine(
            "vllm-dllm-plugin", "0c53db5", "", "vllm-project/dllm-plugin", "dllm_plugin.remasking"
        ),
        # Its base class for models is public: the same tests pass with 0.4.9.2.
        "lm_eval": Engine("lm-eval", "0.4.13", "0.4"),
    }
)


def installed_version(engine: str) -> str | None:
    """The version of an engine's package here, "" of a checkout; None where it is not installed."""
    package, module = ENGINES[engine].package, ENGINES[engine].module
    if module and not _is_here(module):
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "" if module else None


def _is_here(module: str) -> bool:
    """Whether the file of a module is there, told without importing its packages."""
    package, *rest = module.split(".")
    spec = find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    paths = [Path(folder, *rest) for folder in folders]
    return any(p.with_suffix(".py").is_file() or (p / "__init__.py").is_file() for p in paths)


def is_known(engine: str, version: str) -> bool:
    """Whether a version belongs to the series that was tested, as far as that can be told.

    >>> is_known("sglang", "0.5.23.post1"), is_known("sglang", "0.5.230")
    (True, False)
    """
    series = ENGINES[engine].series
    if not series:
        return True
    rest = version.removeprefix(series)
    return version.startswith(series) and not rest[:1].isdigit()


def require(engine: str) -> str:
    """The version of an engine's package, which has to be there and of a series that is known.

    Args:
        engine: a key of `ENGINES`, also the name of the module in `r2dllm_ext.integrations`.

    Raises:
        ImportError: the package is not installed or of another series; names what was tested.
    """
    package, tested, _, repository, _ = ENGINES[engine]
    version = installed_version(engine)
    if version is not None and is_known(engine, version):
        return version
    got = f"{package} is not installed" if version is None else f"{package} {version} is installed"
    source = f"git+https://github.com/{repository}@{tested}" if repository else ""
    raise ImportError(
        f"r2dllm_ext.integrations.{engine} was tested with {package} {tested}, but {got}. "
        f"Fix: pip install '{source or f'{package}=={tested}'}'"
    )
