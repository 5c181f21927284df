"""Reads the directory of a saved adapter: its configuration, and the tensors of one layer after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

from kbitcheck.core.cases import ALL_LINEAR
from kbitcheck.core.errors import UsageError
from kbitcheck.core.facts.adapter import SavedAdapter, SavedLayer, SavedTensor
from kbitcheck.models.checkpoint import CONFIG as MODEL
from kbitcheck.models.checkpoint import read_json
from kbitcheck.observe.adapter import layers, layout

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLE = "adapter_model.bin"


def read(folder: Path) -> SavedAdapter:
    """The adapter in a directory; a ``UsageError`` of one line where there is none, or a damaged one."""
    config = read_config(folder)
    method = config["peft_type"]
    starts, cannot_tell = layout.zero_at_start(method, config)
    wanted = config.get("target_modules") or ()
    wanted = () if wanted == ALL_LINEAR else wanted  # a shorthand, and no pattern
    with _opened(folder) as file:
        return SavedAdapter(
            method=method,
            layers=dict(_layers(file, method, config, starts)),
            starts=starts,
            cannot_tell=cannot_tell,
            required=layout.REQUIRED.get(method, ()),
            asked=() if isinstance(wanted, str) else (*sorted(wanted), *(config.get("target_parameters") or ())),
            pattern=wanted if isinstance(wanted, str) else "",
            base=config.get("base_model_name_or_path") or "",
            task=config.get("task_type") or "",
        )


def read_config(folder: Path) -> Mapping[str, Any]:
    """The configuration of the adapter in a directory."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no directory; an adapter is the directory that save_pretrained writes")
    if not (folder / CONFIG).exists():
        raise UsageError(f"{folder} has no {CONFIG}{_instead(folder)}")
    config = read_json(folder / CONFIG, str(folder))
    if not isinstance(config.get("peft_type"), str):
        raise UsageError(f"{folder}: {CONFIG} states no peft_type")
    for field, is_right in FIELDS.items():
        if config.get(field) is not None and not is_right(config[field]):
            raise UsageError(f"{folder}: {CONFIG} has a wrong {field}: {config[field]!r}")
    return config


def _instead(folder: Path) -> str:
    """What a directory without an adapter holds: those of checkpoints, as trainers leave them, or a whole model."""
    inside = sorted(
        (path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{CONFIG}")), key=_by_number
    )
    if len(inside) == 1:
        return f"; there is one in {inside[0]}"
    if inside:
        return f"; {len(inside)} directories in it have one: name one, as {inside[-1]}"
    return "; it holds a whole model" if (folder / MODEL).exists() else ""


def _by_number(path: Path) -> tuple[int, str]:
    """A checkpoint's place among others: the step in its name."""
    digits = re.findall(r"\d+", path.name)
    return (int(digits[-1]) if digits else 0), str(path)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_patterns(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_pattern, value))


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, int) and row >= 0 for row in value)


FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "r": _is_number,
    "lora_alpha": _is_number,
    "rank_pattern": _are_patterns,
    "alpha_pattern": _are_patterns,
    "target_modules": lambda value: _is_pattern(value) or _are_names(value),
    "target_parameters": _are_names,
    "modules_to_save": _are_names,
    "trainable_token_indices": lambda value: all(
        _are_rows(rows) for rows in (value.values() if isinstance(value, dict) else [value])
    ),
    "token_indices": _are_rows,
    "bias": lambda value: isinstance(value, str),
    "task_type": lambda value: isinstance(value, str),
    "base_model_name_or_path": lambda value: isinstance(value, str),
}


class _Shards:
    """Several files of tensors, as one."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._places = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def keys(self) -> list[str]:
        return sorted(self._places)

    def get_tensor(self, key: str) -> Tensor:
        return self._places[key].get_tensor(key)  # type: ignore[no-any-return]


class _Pickled:
    """A file of tensors that ``torch.save`` wrote, as PEFT did before safetensors; none of its code runs."""

    def __init__(self, path: Path) -> None:
        try:
            tensors: Any = torch.load(path, map_location="cpu", mmap=is_zipfile(path), weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            why = str(error).partition("\n")[0]
            raise UsageError(f"{path} is no pickle of tensors alone ({why}): save it as safetensors") from None
        if not isinstance(tensors, dict) or not all(isinstance(each, torch.Tensor) for each in tensors.values()):
            raise UsageError(f"{path} holds other things than tensors: save it as safetensors")
        self._tensors: dict[str, Tensor] = tensors

    def keys(self) -> list[str]:
        return sorted(self._tensors)

    def get_tensor(self, key: str) -> Tensor:
        return self._tensors[key]


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    if (folder / PICKLE).exists() and not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        yield _Pickled(folder / PICKLE)
        return
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in _files(folder)]
            yield files[0] if len(files) == 1 else _Shards(files)
    except SafetensorError as error:
        raise UsageError(f"{folder}: {WEIGHTS} is truncated or has a damaged header ({error}): save it again") from None


def _files(folder: Path) -> list[Path]:
    """The file of an adapter's tensors, or those of its shards."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX, str(folder)).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise UsageError(f"{folder}: {INDEX} has no weight_map")
        files = [folder / Path(name).name for name in sorted(set(names.values()))]
        lacking = [path.name for path in files if not path.exists()]
        if lacking:
            raise UsageError(f"{folder} has no {', '.join(lacking)}, which its {INDEX} names")
        return files
    raise UsageError(f"{folder} has no {WEIGHTS}")


def _layers(
    file: Any, method: str, config: Mapping[str, Any], starts: tuple[str, ...]
) -> Iterator[tuple[str, SavedLayer]]:
    keys: dict[str, dict[str, str]] = {}
    own: dict[str, bool] = {}
    for key in file.keys():  # noqa: SIM118  (a file of tensors is no dictionary)
        place = layout.place_of(key, method)
        keys.setdefault(place.module, {})[place.part] = key
        own[place.module] = own.get(place.module, True) and place.own
    for module, by_part in sorted(keys.items()):
        tensors: dict[str, Tensor] = {part: file.get_tensor(key) for part, key in by_part.items()}
        yield module, layers.saved(module, by_part, tensors, config, starts, whole=own[module])


def tensor(folder: Path, saved: SavedTensor) -> Tensor:
    """The numbers of a stored tensor."""
    with _opened(folder) as file:
        return file.get_tensor(saved.key)  # type: ignore[no-any-return]


def delta(folder: Path, layer: SavedLayer) -> Tensor:
    """What a low-rank layer adds to its weight: (experts, out, in), in float32."""
    tensors = {part: tensor(folder, saved) for part, saved in layer.tensors.items()}
    return layers.product(tensors, layer.experts, layer.scaling or 1.0)
