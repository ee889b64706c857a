# SPDX-License-Identifier: Apache-2.0
"""Progress bars."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any


def bar(show: bool, name: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Any]:
    """A tqdm bar on stderr; a silent one unless `show`."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("r2dllm_ext.sft needs tqdm: pip install 'r2dllm_ext[sft]'") from error
    return tqdm(desc=name, total=total, initial=done, unit=unit, disable=not show, mininterval=1)
