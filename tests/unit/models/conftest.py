"""No network, one thread (two helpers on a shared core cost tens of times what they save), and checkpoints to break."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

Llama = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llama(tmp_path: Path) -> Llama:
    """Makes a copy of the llama recipe's checkpoint, with fields of its configuration replaced (None drops one)."""
    from kbitcheck.models import resolve

    def make(**fields: Any) -> Path:
        folder = tmp_path / "llama"
        shutil.copytree(resolve("tiny:llama").checkpoint, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | fields
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
