"""From a GGUF file to a configuration, and to an unquantized checkpoint in a temporary directory."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig, modeling_gguf_pytorch_utils

from kbitcheck.models import load as loading
from kbitcheck.models.checkpoint import SINGLE
from kbitcheck.models.random_weights import temporary


def config(file: Path, name: str) -> dict[str, Any]:
    """The fields of the ``config.json`` that a GGUF file's header amounts to. Its tensors are not read.

    Raises:
        UsageError: the file is damaged, or transformers does not know its architecture.
    """
    with loading.quiet(), loading.told(name):
        return _known(file).to_dict()


@cache
def checkpoint(file: Path, options: loading.Options) -> Path:
    """The directory with the file's tensors, dequantized; made once a process, and removed when it ends.

    Raises:
        UsageError: transformers cannot read the file.
    """
    with loading.quiet(), loading.told(options.name):
        known = _known(file)
        model = loading.empty(loading.architecture(known), known)
        found = _read(file, return_tensors=True, model_to_load=model)["tensors"]
        dtype = getattr(torch, options.dtype)
        folder = temporary()
        known.dtype = dtype
        known.save_pretrained(folder)
        wide = {name: found.pop(name).to(dtype).contiguous() for name in list(found)}
        save_file(wide, folder / SINGLE, metadata={"format": "pt"})
    return folder


def _known(file: Path) -> PretrainedConfig:
    fields = _read(file)["config"]
    known = AutoConfig.for_model(fields["model_type"], **{k: v for k, v in fields.items() if k != "model_type"})
    known.architectures = [loading.architecture(known).__name__]
    return known


def _read(file: Path, **options: Any) -> dict[str, Any]:
    """What transformers reads, without its progress bar."""
    module: Any = modeling_gguf_pytorch_utils
    with mock.patch.object(module, "tqdm", partial(module.tqdm, disable=True)):
        found: dict[str, Any] = module.load_gguf_checkpoint(str(file), **options)
    return found
