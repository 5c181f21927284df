"""Is a directory a checkpoint? Its configuration and the headers of its safetensors files, read without any library."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kbitcheck.core.errors import UsageError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

WIDTHS = {
    64: "F64 I64 U64 C64",
    32: "F32 I32 U32",
    16: "F16 BF16 I16 U16",
    8: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    6: "F6_E2M3 F6_E3M2",
    4: "F4",
}
BITS = {dtype: bits for bits, dtypes in WIDTHS.items() for dtype in dtypes.split()}
LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_config(path: Path, name: str) -> dict[str, Any]:
    """The object in a ``config.json``.

    Raises:
        UsageError: it is no JSON object, or states no ``model_type``.
    """
    config = read_json(path, name)
    if not isinstance(config.get("model_type"), str):
        raise UsageError(f"{name}: {path.name} states no model_type, so it is not a transformers configuration")
    return config


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UsageError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{name}: {path.name} cannot be read as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{name}: {path.name} holds a {type(content).__name__}, not an object")
    return content


def weight_files(folder: Path, name: str, *, allow_pickle: bool = False) -> list[Path]:
    """The files that hold a directory's weights, in the order transformers looks for them; empty where there are none.

    Raises:
        UsageError: a shard is absent, or there is nothing but a pickle and pickles are not allowed.
    """
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


def read_header(path: Path, name: str) -> Mapping[str, Mapping[str, Any]]:
    """The tensors of a safetensors file, by name: ``dtype``, ``shape`` and ``data_offsets`` into the data.

    The format is 8 bytes of little-endian header length, the header as JSON, and the data without gaps:
    https://github.com/huggingface/safetensors#format.

    Raises:
        UsageError: the file is truncated, or its header is not what the format says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
        if not 0 < length <= min(size - 8, LONGEST_HEADER):
            raise UsageError(f"{name}: {path.name} is truncated or no safetensors file ({size} bytes): get it again")
        text = file.read(length)
    try:
        header = dict(json.loads(text))
        header.pop("__metadata__", None)
        tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        end = 0
        for tensor, entry in tensors:
            end = _end(tensor, entry, end)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{name}: {path.name} has a damaged header ({type(error).__name__}: {reason})") from None
    if end != size - 8 - length:
        have = "truncated" if end > size - 8 - length else "damaged"
        raise UsageError(f"{name}: {path.name} is {have}: {size - 8 - length} bytes of tensors, {end} announced")
    return dict(tensors)


def floating_dtype(headers: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Torch's name of the dtype that most floating tensors have; None where there are none."""
    dtypes = [FLOATING[entry["dtype"]] for entry in headers.values() if entry["dtype"] in FLOATING]
    return max(dtypes, key=dtypes.count, default=None)


def _end(tensor: str, entry: Mapping[str, Any], start: int) -> int:
    begin, end = entry["data_offsets"]
    bits = BITS[entry["dtype"]]
    for side in entry["shape"]:
        if not isinstance(side, int) or side < 0:
            raise ValueError(f"{tensor} has a side of {side!r}")
        bits *= side
    if begin != start or (end - begin) * 8 != bits:
        raise ValueError(f"{tensor} has offsets {begin} to {end}")
    return int(end)


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
