"""From a GGUF file to a configuration, and to an unquantized checkpoint in a temporary directory."""

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
    """The fields of the ``config.json`` that a GGUF file's header amounts to. Its tensors are not read."""
    with loading.quiet(), loading.errors_as_usage(name):
        return _configuration(file).to_dict()


@cache
def checkpoint(file: Path, options: loading.Options) -> Path:
    """The directory with the file's tensors, dequantized; made once a process, and removed when it ends."""
    with loading.quiet(), loading.errors_as_usage(options.name):
        config = _configuration(file)
        model = loading.empty(loading.architecture(config), config)
        content = _read(file, return_tensors=True, model_to_load=model)["tensors"]
        dtype = getattr(torch, options.dtype)
        folder = temporary()
        config.dtype = dtype
        config.save_pretrained(folder)
        wide = {name: content.pop(name).to(dtype).contiguous() for name in list(content)}
        save_file(wide, folder / SINGLE, metadata={"format": "pt"})
    return folder


def _configuration(file: Path) -> PretrainedConfig:
    config = AutoConfig.for_model(**_read(file)["config"])
    config.architectures = [loading.architecture(config).__name__]
    return config


def _read(file: Path, **options: Any) -> dict[str, Any]:
    """What transformers reads, without its progress bar."""
    module: Any = modeling_gguf_pytorch_utils
    with mock.patch.object(module, "tqdm", partial(module.tqdm, disable=True)):
        content: dict[str, Any] = module.load_gguf_checkpoint(str(file), **options)
    return content
