# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the device, the implementation under test, threads that are put back."""

from __future__ import annotations

import importlib
import os
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from cases import EMULATED
from hypothesis import HealthCheck, settings


def pytest_configure(config: pytest.Config) -> None:
    """One profile for all property tests: no deadline, as the machine may be busy; and the same
    draws in every run, unless `--hypothesis-seed=N` asks for others."""
    settings.register_profile(
        "r2dllm",
        deadline=None,
        derandomize=config.getoption("hypothesis_seed") is None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("r2dllm")


# The oracle works on small tensors, where a second thread costs more than it brings; tests that are
# about threads ask for them.
torch.set_num_threads(1)


class Implementation(NamedTuple):
    """The ops of the package or their oracle, and the device to run them on."""

    ops: ModuleType
    device: str


REQUIRED = os.environ.get("R2DLLM_REQUIRE_CUDA") == "1"


def require_card() -> str:
    """A real card, or a visible skip; a failure under R2DLLM_REQUIRE_CUDA=1."""
    built = importlib.import_module("r2dllm_ext").build_info()["cuda"]
    if built and not EMULATED and torch.cuda.is_available():
        return "cuda"
    reason = "emulates CUDA" if EMULATED else "no CUDA device" if built else "built without CUDA"
    if REQUIRED:
        pytest.fail(f"R2DLLM_REQUIRE_CUDA=1, but {reason}")
    return pytest.skip(reason)


def require_device(device: str) -> str:
    """Where to run the cases of `device`.

    Where CUDA is emulated the CPU stands in for a card, unless one is required, and the CPU's own
    cases are skipped: a plain build has them.
    """
    if EMULATED and not REQUIRED:
        return pytest.skip("emulates CUDA") if device == "cpu" else "cpu"
    return require_card() if device == "cuda" else device


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    return require_device(request.param)


@pytest.fixture
def cuda() -> str:
    return require_card()


@pytest.fixture(scope="session")
def other_seed(request) -> int | None:
    """Of `--hypothesis-seed`. None: the draws of every run, which are known to reach every case."""
    given = request.config.getoption("hypothesis_seed")
    return None if given is None else int(given)


@pytest.fixture(scope="session")
def r2() -> ModuleType:
    """The package with its extension loaded; that it is missing is a failure."""
    importlib.import_module("r2dllm_ext.ops")
    return importlib.import_module("r2dllm_ext")


@pytest.fixture(params=["reference-cpu", "extension-cpu", "extension-cuda"])
def implementation(request) -> Implementation:
    name, device = request.param.split("-")
    module = "r2dllm_ext.reference" if name == "reference" else "r2dllm_ext"
    if name == "extension":
        device = require_device(device)
    return Implementation(importlib.import_module(module), device)


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone at the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def run(capsys):
    """Runs a command line; returns its status, stdout and stderr."""

    def call(*arguments: object) -> SimpleNamespace:
        main = importlib.import_module("r2dllm_ext.cli").main
        status = main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return call
