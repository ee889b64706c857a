# SPDX-License-Identifier: Apache-2.0
"""Which versions of an engine its integration was tested with, and the one error for all others.

Nothing is imported to find a version: it is read from what the package's installation left.
"""

from __future__ import annotations

from importlib import metadata
from types import MappingProxyType
from typing import NamedTuple


class Engine(NamedTuple):
    """A package that an integration is written for."""

    package: str  # its name for pip
    tested: str  # the version that its tests were run with
    series: str  # versions that begin so are taken: those that promise the same interface


ENGINES = MappingProxyType(
    {
        # Its algorithms are no public interface: another release may have another base class.
        "sglang": Engine("sglang", "0.5.23", "0.5.23"),
        # 0.43 gives schedulers another `step` (pull request 14741).
        "diffusers": Engine("diffusers", "0.42.1", "0.42"),
        # What `generate` hands to a callable changes between minor releases.
        "transformers": Engine("transformers", "5.24.0", "5.24"),
    }
)


def installed_version(engine: str) -> str | None:
    """The version of an engine's package here; None where it is not installed."""
    try:
        return metadata.version(ENGINES[engine].package)
    except metadata.PackageNotFoundError:
        return None


def is_known(engine: str, version: str) -> bool:
    """Whether a version belongs to the series that was tested.

    >>> is_known("sglang", "0.5.23.post1"), is_known("sglang", "0.5.230")
    (True, False)
    """
    series = ENGINES[engine].series
    rest = version.removeprefix(series)
    return version.startswith(series) and not rest[:1].isdigit()


def require(engine: str) -> str:
    """The version of an engine's package, which has to be there and of a series that is known.

    Args:
        engine: a key of `ENGINES`, also the name of the module in `r2dllm_ext.integrations`.

    Raises:
        ImportError: the package is not installed or of another series; names what was tested.
    """
    package, tested, _ = ENGINES[engine]
    version = installed_version(engine)
    if version is not None and is_known(engine, version):
        return version
    got = f"{package} is not installed" if version is None else f"{package} {version} is installed"
    raise ImportError(
        f"r2dllm_ext.integrations.{engine} was tested with {package} {tested}, but {got}. "
        f"Fix: pip install '{package}=={tested}'"
    )
