# SPDX-License-Identifier: Apache-2.0
"""Recorded decodes of the authors' code: every rule of every step, and whole decodes.

The shipped subset always; all traces where the folder R2DLLM_GOLDEN exists (default: a folder
`shared/golden` beside the repository).
"""

from collections import Counter

import numpy as np
import pytest
from golden import (
    FILES,
    RECORDED,
    SHIPPED,
    check_free_run,
    check_generate,
    check_steps,
    features,
    read,
)

from r2dllm_ext.config import Rule

RULES = set(Rule) - {Rule.NONE, Rule.NEIGHBOUR, Rule.EDIT}  # those of the release
TRACES, STEPS = 503, 7381  # of the whole recording
needs_recording = pytest.mark.skipif(
    not RECORDED.is_dir(), reason=f"no recording at {RECORDED} (R2DLLM_GOLDEN)"
)


def ids(path) -> set[str]:
    """Names of the traces whose arrays a file holds."""
    with np.load(path) as file:
        return {key.split("/")[0] for key in file.files} - {"index"}


def check_decode(implementation, trace) -> None:
    """A whole decode: `generate` where there is one, the recorded loop for the oracle."""
    ops, device = implementation
    if hasattr(ops, "generate"):
        check_generate(ops.generate, trace, device)
    else:
        check_free_run(ops, trace, device)


def test_subset_is_complete():
    assert sorted(path.stem for path in SHIPPED.glob("*.npz")) == sorted(FILES)
    for name in FILES:
        path = SHIPPED / f"{name}.npz"
        assert [trace.name for trace in read(path)] == sorted(ids(path)) != []


def test_subset_steps(implementation):
    fired: Counter = Counter()
    for name in FILES:
        for trace in read(SHIPPED / f"{name}.npz"):
            fired += check_steps(implementation.ops, trace, implementation.device)
    assert set(fired) == RULES, f"a rule never fired: {fired}"


def test_subset_decodes(implementation):
    for name in FILES:
        for trace in read(SHIPPED / f"{name}.npz"):
            check_decode(implementation, trace)


@needs_recording
def test_recording_is_complete():
    metas = [trace.meta for name in FILES for trace in read(RECORDED / f"{name}.npz")]
    assert {m["id"] for m in metas} == set().union(*(ids(RECORDED / f"{n}.npz") for n in FILES))
    assert (len(metas), sum(m["nfe"] for m in metas)) == (TRACES, STEPS)
    for name in FILES:  # the subset covers what its file covers
        whole = set().union(*(features(m) for m in metas if m["id"].startswith(name)))
        shipped = set().union(*(features(t.meta) for t in read(SHIPPED / f"{name}.npz")))
        assert shipped == whole


@needs_recording
@pytest.mark.parametrize("name", FILES)
def test_recorded_steps(implementation, name):
    for trace in read(RECORDED / f"{name}.npz"):
        check_steps(implementation.ops, trace, implementation.device)


@needs_recording
@pytest.mark.parametrize("name", FILES)
def test_recorded_decodes(implementation, name):
    for trace in read(RECORDED / f"{name}.npz"):
        check_decode(implementation, trace)
