"""A checkpoint whose weights are packed already, beside the model that it is loaded into: what of it has a place there, bit by bit."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from kbitcheck import backends
from kbitcheck.backends.registry import available
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import StoredFacts
from kbitcheck.models import checkpoint, internals

NEEDS = "needs transformers 5: no earlier one makes a parameter of several tensors of a checkpoint"
NO_STATE = "no tensor of the checkpoint is known here to unpack another"
ON_LOAD = "the model is quantized on load, not by its checkpoint"

_folders: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()


def remember(model: nn.Module, folder: Path) -> None:
    """The packed weights of a model are those that a folder holds."""
    _folders[model] = folder


def stored(model: PreTrainedModel) -> StoredFacts:
    """Of a loaded model: the quantization state in its checkpoint, and where the model's differs.

    Raises:
        Unavailable: no checkpoint held it, or transformers is older than 5.
    """
    folder = _folders.get(model)
    if folder is None:
        raise Unavailable(ON_LOAD)
    names = tensors(folder)
    return StoredFacts(states=_count(names), lost=lost(model, names), differing=_differing(model, names))


def stored_without_numbers(model: PreTrainedModel, folder: Path) -> StoredFacts:
    """Of a model on the meta device: the quantization state that a folder's files name, and what of it has no place.

    The index of a checkpoint is enough: none of its shards need be there.

    Raises:
        Unavailable: the folder names none, or transformers is older than 5.
    """
    names = tensors(folder)
    return StoredFacts(states=_count(names), lost=lost(model, names))


def tensors(folder: Path) -> Mapping[str, Path]:
    """The file of each tensor in a folder, by its name; empty where no safetensors file and no index of such is there."""
    if (folder / checkpoint.SINGLE).exists():
        with safe_open(folder / checkpoint.SINGLE, framework="np") as opened:
            return dict.fromkeys(opened.keys(), folder / checkpoint.SINGLE)
    if not (folder / checkpoint.INDEX).exists():
        return {}
    named = checkpoint.read_json(folder / checkpoint.INDEX, folder.name).get("weight_map") or {}
    return {name: folder / file for name, file in named.items()}


def _count(names: Mapping[str, Path]) -> int:
    if states := len(_states(names)):
        return states
    raise Unavailable(NO_STATE)


def lost(model: PreTrainedModel, names: Mapping[str, Path]) -> dict[str, str]:
    """By the model's name of a parameter: why packed weights of the checkpoint are not unpacked there.

    Raises:
        Unavailable: transformers is older than 5.
    """
    rename = _renaming(model)
    holders = {name for name, _ in backends.holders(model)}
    reasons: dict[str, str] = {}
    for weight in _states(names):
        name, joined = rename(weight)
        if not {name, name.rpartition(".")[0]} & holders:
            place = (
                "no quantized layer"
                if any(n == name for n, _ in model.named_parameters())
                else "no parameter of this name"
            )
            reasons[name] = f"{place}; packed bytes of several tensors are joined there" if joined else place
    return reasons


def _renaming(model: PreTrainedModel) -> internals.Renaming:
    rename = internals.renaming(model)
    if rename is None:
        raise Unavailable(NEEDS)
    return rename


def _states(names: Mapping[str, Path]) -> dict[str, list[str]]:
    """By the name of each packed weight: the tensors that unpack it."""
    patterns = [re.compile(each.stored_state) for each in available() if each.stored_state]
    states: dict[str, list[str]] = {}
    for name in names:
        for pattern in patterns:
            if match := pattern.fullmatch(name):
                weight = match["weight"] if match["weight"] in names else f"{match['weight']}.weight"
                states.setdefault(weight, []).append(name)
    return states


def _differing(model: PreTrainedModel, names: Mapping[str, Path]) -> dict[str, str]:
    """By the model's name of a packed weight: the tensors of it that are not the checkpoint's."""
    rename, own, read = _renaming(model), model.state_dict(), _reader()
    differ: dict[str, str] = {}
    for weight, state in _states(names).items():
        name, joined = rename(weight)
        if joined:
            continue
        stem, renamed = weight.removesuffix(".weight"), name.removesuffix(".weight")
        for key in (weight, *state):
            there = own.get(renamed + key.removeprefix(stem))
            if there is None or not _same(there, read(names[key], key)):
                part = key.removeprefix(stem).lstrip(".")
                differ[name] = f"{differ[name]}, {part}" if name in differ else part
    return differ


def _reader() -> Callable[[Path, str], torch.Tensor]:
    """Reads tensors one by one; each file's header once, as that of a large file names thousands."""
    opened = cache(partial(safe_open, framework="pt"))

    def read(file: Path, key: str) -> torch.Tensor:
        tensor: torch.Tensor = opened(file).get_tensor(key)
        return tensor

    return read


def _same(there: Any, file: torch.Tensor) -> bool:
    """Whether two tensors have the same bits, or, where they hold a JSON object, whether what both name is the same."""
    if not isinstance(there, torch.Tensor):
        return bool(torch.equal(torch.as_tensor(there), file))
    here = there.detach().cpu()
    if here.dtype is file.dtype and here.shape == file.shape and torch.equal(_bits(here), _bits(file)):
        return True
    try:
        one, other = (json.loads(bytes(t.flatten().tolist())) for t in (here, file))
    except (ValueError, TypeError):
        return False
    return all(one[key] == other[key] for key in {*one} & {*other})


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def lost_names(model: PreTrainedModel, folder: Path) -> Iterator[str]:
    """The names of ``lost``; none before transformers 5."""
    if internals.renaming(model) is not None:
        yield from lost(model, tensors(folder))
