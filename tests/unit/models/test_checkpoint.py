from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kbitcheck.core.errors import UsageError
from kbitcheck.models import checkpoint

HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [8, 20]},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "none": {"dtype": "F32", "shape": [0], "data_offsets": [20, 20]},
}


def pack(header: Any, data: int = 20) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


SOUND = pack(HEADER)
shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(folder: Path, content: bytes) -> Any:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return checkpoint.read_dtypes(path, "it")


def test_sound_header_is_read_in_the_order_of_the_data(tmp_path: Path) -> None:
    assert read(tmp_path, SOUND) == ["F32", "BF16", "F32"]
    assert checkpoint.floating_dtype(["F32", "BF16", "BF16"]) == "bfloat16"
    assert checkpoint.floating_dtype(["U8"]) is None


@shared_folder
@given(length=st.integers(0, len(SOUND) - 1))
def test_every_truncation_is_told(tmp_path: Path, length: int) -> None:
    with pytest.raises(UsageError, match="truncated"):
        read(tmp_path, SOUND[:length])


@shared_folder
@given(extra=st.binary(min_size=1, max_size=9))
def test_anything_appended_is_told(tmp_path: Path, extra: bytes) -> None:
    with pytest.raises(UsageError, match="damaged"):
        read(tmp_path, SOUND + extra)


@shared_folder
@given(at=st.integers(0, len(SOUND) - 21), byte=st.integers(0, 255))
def test_a_changed_byte_raises_nothing_but_usage_errors(tmp_path: Path, at: int, byte: int) -> None:
    with suppress(UsageError):
        read(tmp_path, SOUND[:at] + bytes([byte]) + SOUND[at + 1 :])


@pytest.mark.parametrize(
    "entry",
    [
        None,
        "text",
        {},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["aa"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]},
    ],
)
def test_impossible_entries_are_told(tmp_path: Path, entry: Any) -> None:
    with pytest.raises(UsageError, match="damaged header"):
        read(tmp_path, pack({"a": entry}, 8))


@pytest.mark.parametrize("header", [[], 3, "a", [["a", 1]]])
def test_headers_that_are_no_tables_are_told(tmp_path: Path, header: Any) -> None:
    with pytest.raises(UsageError, match=r"damaged|truncated"):
        read(tmp_path, pack(header, 8))


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "cannot be read as JSON"), ("[]", "holds a list"), ("\xff", "JSON"), ("{}", "states no model_type")],
)
def test_broken_configurations_are_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=told):
        checkpoint.read_config(path, "it")


def test_index_needs_every_shard(tmp_path: Path) -> None:
    index = tmp_path / checkpoint.INDEX
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}))
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(UsageError, match=r"1 of 2 shards are absent: 2\.safetensors"):
        checkpoint.weight_files(tmp_path, "it")
    (tmp_path / "2.safetensors").touch()
    assert [path.name for path in checkpoint.weight_files(tmp_path, "it")] == ["1.safetensors", "2.safetensors"]


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_index_without_a_map_is_told(tmp_path: Path, content: Any) -> None:
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(content))
    with pytest.raises(UsageError, match="no weight_map"):
        checkpoint.weight_files(tmp_path, "it")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_stays_in_its_directory(tmp_path: Path, file: str) -> None:
    (tmp_path / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UsageError, match="outside the directory"):
        checkpoint.weight_files(tmp_path, "it")


def test_pickles_need_permission_and_come_last(tmp_path: Path) -> None:
    assert checkpoint.weight_files(tmp_path, "it") == []
    (tmp_path / checkpoint.PICKLES[1]).write_text(json.dumps({"weight_map": {"a": "1.bin"}}))
    (tmp_path / "1.bin").touch()
    with pytest.raises(UsageError, match="give --allow-pickle"):
        checkpoint.weight_files(tmp_path, "it")
    assert checkpoint.weight_files(tmp_path, "it", allow_pickle=True) == [tmp_path / "1.bin"]
    (tmp_path / checkpoint.PICKLES[0]).touch()
    assert checkpoint.weight_files(tmp_path, "it", allow_pickle=True) == [tmp_path / checkpoint.PICKLES[0]]
    (tmp_path / checkpoint.SINGLE).touch()
    assert checkpoint.weight_files(tmp_path, "it") == [tmp_path / checkpoint.SINGLE]
