"""Checkpoints to break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llama = Callable[..., Path]


@pytest.fixture
def llama(tmp_path: Path) -> Llama:
    """Makes a copy of the llama recipe's checkpoint, with fields of its configuration replaced (None drops one)."""
    from kbitcheck.models.sources.resolve import resolve

    def make(**fields: Any) -> Path:
        folder = tmp_path / "llama"
        shutil.copytree(resolve("tiny:llama").checkpoint, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | fields
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
