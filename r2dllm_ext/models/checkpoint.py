# SPDX-License-Identifier: Apache-2.0
"""Load and save LLaDA and Dream checkpoints: config.json and safetensors, sharded or not."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from .._checks import device as checked_device
from .._checks import instance, integer, refuse
from .config import ModelConfig
from .keys import is_rotary_buffer, naming_hint, published_key
from .transformer import Transformer

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_DTYPES = ("F64", "F32", "BF16", "F16")  # storage an unquantised checkpoint may use
_BUNDLED = Path(__file__).parent.parent / "tasks" / "models"
# There is no tuned model of pronounce yet, so both names mean the base.
_ALIASES = {
    "ledger": _BUNDLED / "ledger",
    "ledger-base": _BUNDLED / "ledger-base",
    "pronounce": _BUNDLED / "pronounce-base",
    "pronounce-base": _BUNDLED / "pronounce-base",
}


@torch.inference_mode(False)  # or weights loaded under it could never be trained
def load_model(
    path_or_hub_id: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """A LLaDA or Dream checkpoint as our transformer, in eval mode and ready for `generate`.

    Args:
        path_or_hub_id: a folder with `config.json` and `model.safetensors` (or shards and their
            `model.safetensors.index.json`), a hub id such as "GSAI-ML/LLaDA-8B-Instruct" (needs
            `huggingface_hub`), or the name of a small model inside this package: "ledger" (tuned to
            decode in few steps), "ledger-base", "pronounce". A local folder wins over a hub id of
            the same name, the models of the package over both.
        device: where the weights go, default "cpu".
        dtype: any floating dtype; None keeps the one the checkpoint's embedding is stored in, and
            is float32 for the models of the package, which are stored in 16 bits.

    The ids of the mask, of the end (a tuple where the checkpoint names several) and of padding are
    those of `config.json` and, where it has none, of `generation_config.json`. A stored head is
    accepted beside a tied one if it equals the embedding; tables of the rotary embedding are not
    read.

    Tensors go one by one from the file to `device` and `dtype`, so that the peak is the weights
    and one tensor. Raises `ValueError` naming key, file and shapes if the weights do not fit the
    config, the file if it is damaged, file, field and value for a config that is not supported;
    `FileNotFoundError` if there is no checkpoint; `ImportError` without safetensors, or
    huggingface_hub for a hub id.

    >>> load_model("ledger", dtype=torch.bfloat16).dtype
    torch.bfloat16
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"load_model: dtype takes a floating torch.dtype or None, got {dtype!r}")
    if not isinstance(path_or_hub_id, (str, os.PathLike)):
        takes = "a str or a path"
        refuse(TypeError, "load_model", "path_or_hub_id", takes, path_or_hub_id)
    device = checked_device("load_model", "device", device)
    folder = _locate(path_or_hub_id)
    if dtype is None and os.fspath(path_or_hub_id) in _ALIASES:
        dtype = torch.float32
    config = _read_config(folder)
    with torch.device("meta"):
        model = Transformer(config).eval()
    sources = {key: file for key, file in _sources(folder).items() if not is_rotary_buffer(key)}
    names = {published_key(config.family, name): name for name, _ in model.named_parameters()}
    expected = {key: list(model.get_parameter(name).shape) for key, name in names.items()}
    embed, head = (published_key(config.family, f"{name}.weight") for name in ("embed", "head"))
    stored_twice = config.tied_head and head in sources
    if stored_twice:
        expected[head] = expected[embed]
    _check(folder, sources, expected)
    if stored_twice:
        _check_equal(sources, embed, head, expected[embed][0])

    # The embedding comes first: where no dtype is asked for, its own decides for all.
    for key, name in names.items():
        # A file is opened anew for each tensor: an open map would keep every page read so far.
        with _open(sources[key]) as file:
            stored = file.get_tensor(key)
        dtype = dtype or stored.dtype
        _assign(model, name, stored.to(device, dtype, copy=True))
        del stored
    model.rotary.to(device)
    return model


def save_model(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Writes `config.json` and safetensors in the published layout of the model's family.

    Args:
        folder: created if need be; shards left in it by an earlier save are removed.
        max_shard_size: bytes; weights above it are split over several files and an index. At most
            one shard is copied to the CPU at a time.

    `load_model(folder)` gives the same bits back.

    >>> import tempfile
    >>> model = load_model("ledger")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(model, folder)
    ...     same = load_model(folder)
    >>> torch.equal(same.lm_head_weight, model.lm_head_weight)
    True
    """
    instance("save_model", "model", model, Transformer)
    max_shard_size = integer("save_model", "max_shard_size", max_shard_size, 1)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = model.config.family
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in model.named_parameters():
        if shards[-1] and size + weight.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][published_key(family, name)] = weight.detach()
        size += weight.nbytes

    n = len(shards)
    files = [_SINGLE] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    for file, shard in zip(files, shards, strict=True):
        on_cpu = {key: weight.cpu().contiguous() for key, weight in shard.items()}
        _save_file(on_cpu, folder / f"{file}.part")
        os.replace(folder / f"{file}.part", folder / file)
    if n > 1:
        where = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
        total = sum(weight.nbytes for shard in shards for weight in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / _INDEX, index)
    for stale in (*folder.glob("model-*-of-*.safetensors"), folder / _SINGLE, folder / _INDEX):
        if stale.name not in files and not (n > 1 and stale.name == _INDEX):
            stale.unlink(missing_ok=True)
    _write_json(folder / _CONFIG, model.config.to_hf_config(model.dtype))


@contextlib.contextmanager
def _open(path: Path):
    """A safetensors file, read lazily; a damaged one is a `ValueError` that names it."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"load_model: {path} is not a safetensors file: {error}") from error


def _save_file(weights: dict[str, Tensor], path: Path) -> None:
    """A disk that is full, say, is an `OSError` that names the file."""
    safetensors = _safetensors()
    path.touch()
    mode = path.stat().st_mode  # as the umask has it; safetensors 0.8 lets the owner alone read
    try:
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
        path.chmod(mode)
    except safetensors.SafetensorError as error:
        raise OSError(f"save_model: {path} can't be written: {error}") from error


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "r2dllm_ext.models reads and writes checkpoints with safetensors: "
            "pip install 'r2dllm_ext[models]'"
        ) from error
    return safetensors


def _locate(path_or_hub_id: str | os.PathLike[str]) -> Path:
    name = os.fspath(path_or_hub_id)
    path = _ALIASES.get(name, Path(name).expanduser())
    if name and path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(
            f"load_model: no folder {name and str(path)!r}, and no hub id either"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"load_model: there is no folder {name!r}, and to fetch it from the hub needs "
            "huggingface_hub: pip install 'r2dllm_ext[hub]'"
        ) from error
    try:
        wanted = [_CONFIG, _GENERATION, "*.safetensors", _INDEX]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # what the hub client raises for a bad name or network
        raise FileNotFoundError(
            f"load_model: {name!r} is neither a local folder nor to be had from the hub: {error}"
        ) from error


def _sources(folder: Path) -> dict[str, Path]:
    """Published key -> the file that holds it."""
    if (folder / _SINGLE).is_file():
        with _open(folder / _SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / _SINGLE)
    if not (folder / _INDEX).is_file():
        raise FileNotFoundError(f"load_model: neither {_SINGLE} nor {_INDEX} in {str(folder)!r}")
    where = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(where, dict):
        raise ValueError(f"load_model: {folder / _INDEX} has no weight_map, an object of key: file")
    for key, file in where.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise ValueError(
                f"load_model: weight_map of {folder / _INDEX} takes names of files beside it, got "
                f"{file!r} for key {key}"
            )
    return {key: folder / file for key, file in where.items()}


def _check(folder: Path, sources: dict[str, Path], expected: dict[str, list[int]]) -> None:
    """Compares keys and shapes with the config's before a byte of weights is read."""
    missing = [key for key in expected if key not in sources]
    if missing:
        first = missing[0]
        count = f" (the first of {len(missing)})" if len(missing) > 1 else ""
        raise ValueError(
            f"load_model: key {first} {expected[first]} is missing from {str(folder)!r}{count}"
            + naming_hint(first, sources)
        )
    unexpected = [key for key in sources if key not in expected]
    for path in dict.fromkeys(sources.values()):
        if not path.is_file():
            raise FileNotFoundError(f"load_model: {_INDEX} names {path}, which does not exist")
        with _open(path) as file:
            held = set(file.keys())
            for key in (k for k, source in sources.items() if source == path):
                if key not in held:
                    raise ValueError(f"load_model: key {key} is missing from {path}")
                view = file.get_slice(key)
                shape, kind = view.get_shape(), view.get_dtype()
                if key not in expected:
                    count = f" (one of {len(unexpected)})" if len(unexpected) > 1 else ""
                    raise ValueError(f"load_model: unexpected key {key} {shape} in {path}{count}")
                if shape != expected[key]:
                    raise ValueError(
                        f"load_model: key {key} in {path} takes shape {expected[key]}, as "
                        f"{_CONFIG} says, got {shape}"
                    )
                if kind not in _DTYPES:
                    raise ValueError(
                        f"load_model: key {key} in {path} takes a dtype of {', '.join(_DTYPES)}, "
                        f"got {kind}"
                    )


def _check_equal(sources: dict[str, Path], embed: str, head: str, rows: int) -> None:
    """A head that is stored beside a tied one; read in slices, as it may be a gigabyte."""
    step = 4096
    with _open(sources[embed]) as embed_file, _open(sources[head]) as head_file:
        tied, stored = embed_file.get_slice(embed), head_file.get_slice(head)
        for row in range(0, rows, step):
            if not torch.equal(tied[row : row + step].double(), stored[row : row + step].double()):
                raise ValueError(
                    f"load_model: key {head} in {sources[head]} takes the values of {embed}, to "
                    f"which {_CONFIG} ties it, got others from row {row} on"
                )


def _assign(model: Transformer, name: str, weight: Tensor) -> None:
    module, leaf = name.rsplit(".", 1)
    setattr(model.get_submodule(module), leaf, nn.Parameter(weight))


def _read_config(folder: Path) -> ModelConfig:
    path, generation = folder / _CONFIG, folder / _GENERATION
    config = ModelConfig.from_hf_config(_read_json(path), f"load_model: {path}")
    if None in (config.mask_id, config.eos_id, config.pad_id) and generation.is_file():
        config = config.with_token_ids(_read_json(generation), f"load_model: {generation}")
    return config


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"load_model: no {path.name} in {str(path.parent)!r}")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise ValueError(f"load_model: {path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"load_model: {path} takes a JSON object, got {type(value).__name__}")
    return value


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
