"""Is a directory a checkpoint? Its configuration and the headers of its safetensors files, read without torch."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kbitcheck.core.errors import UsageError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_config(path: Path, name: str) -> dict[str, Any]:
    """The object in a ``config.json``."""
    config = read_json(path, name)
    if not isinstance(config.get("model_type"), str):
        raise UsageError(f"{name}: {path.name} states no model_type, so it is not a transformers configuration")
    return config


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{name}: {path.name} cannot be read as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{name}: {path.name} holds a {type(content).__name__}, not an object")
    return content


def weight_files(folder: Path, name: str, *, allow_pickle: bool = False) -> list[Path]:
    """The files that hold a directory's weights, in the order transformers looks for them; empty where there are none."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        return _shards(folder, INDEX, name)
    single, index = (folder / file for file in PICKLES)
    if not (single.exists() or index.exists()):
        return []
    if not allow_pickle:
        raise UsageError(
            f"{name}: its weights are a pickle, which can run code when it is read; "
            "convert it to safetensors, or give --allow-pickle"
        )
    return [single] if single.exists() else _shards(folder, index.name, name)


def read_dtypes(path: Path, name: str) -> list[str]:
    """The dtypes of a safetensors file's tensors, in the order of the data."""
    try:
        with safe_open(path, framework="np") as file:
            return [file.get_slice(tensor).get_dtype() for tensor in file.offset_keys()]
    except SafetensorError as error:
        raise UsageError(f"{name}: {path.name} is truncated or has a damaged header ({error}): get it again") from None


def floating_dtype(dtypes: Iterable[str]) -> str | None:
    """Torch's name of the floating dtype that is there most often; None where there is none."""
    floating = [FLOATING[dtype] for dtype in dtypes if dtype in FLOATING]
    return max(floating, key=floating.count, default=None)


def _shards(folder: Path, index: str, name: str) -> list[Path]:
    named = read_json(folder / index, name).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise UsageError(f"{name}: {index} has no weight_map")
    files = sorted(set(named.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise UsageError(f"{name}: {index} names {outside[0]!r}, which is outside the directory")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UsageError(f"{name}: {len(missing)} of {len(files)} shards are absent: {', '.join(missing[:3])}")
    return [folder / file for file in files]
