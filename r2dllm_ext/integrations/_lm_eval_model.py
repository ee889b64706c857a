# SPDX-License-Identifier: Apache-2.0
"""A session as the harness sees any model: its arguments, its name, its chat template."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch

from .._checks import refuse
from ..cli.session import Session
from ..cli.text import Pretrained
from ._lm_eval_options import WHERE, as_arguments, batch_rows, session_options
from ._versions import require

require("lm_eval")

from lm_eval.api.model import LM  # noqa: E402  (after our own error)
from lm_eval.utils import simple_parse_args_string  # noqa: E402


class SessionModel(LM):
    """What does not depend on how requests are answered."""

    def __init__(self, pretrained: str | None, batch_size: int | str, arguments: dict) -> None:
        super().__init__()
        self._batch_size = batch_rows(batch_size)
        args = session_options(pretrained, arguments)
        with as_arguments():
            self._session = Session(args)
            self._codec = self._session.codec
        self._gen_length = args.gen_length  # or None: as its tasks ask
        self._device = self._session.model.device

    @classmethod
    def create_from_arg_obj(cls, arg_dict, additional_config=None):
        """A model's arguments go before the harness's options, which have values unless asked."""
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        # So has --device, "cuda:0" on all machines; its other models fall back too.
        device = given.get("device") if "device" not in arg_dict else None
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            warnings.warn(f"{WHERE}: this torch sees no {device}: on the CPU", stacklevel=2)
            del given["device"]
        return cls(**{**given, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:
        _refuse_likelihood("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:
        _refuse_likelihood("loglikelihood_rolling", requests)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not isinstance(self._codec, Pretrained) or self._codec.chat_template is None:
            takes = "a checkpoint whose tokenizer has a chat template"
            refuse(ValueError, WHERE, "--apply_chat_template", takes, self._session.name)
        return self._codec.chat_text(chat_history, answer_begun=not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if isinstance(chat_template, str):
            takes = "no name: it is the tokenizer's template"
            refuse(ValueError, WHERE, "--apply_chat_template", takes, chat_template)
        return getattr(self._codec, "chat_template", None) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self._session.name.replace("/", "__")


def _refuse_likelihood(kind: str, requests: list[Any]) -> NoReturn:
    tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
    raise NotImplementedError(
        f"{WHERE}: takes tasks of output_type generate_until, got {kind} requests of {tasks}: "
        "a masked-diffusion model has no likelihood in closed form"
    )
