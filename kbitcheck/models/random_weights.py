"""Checkpoints of random weights: each tensor is drawn from its name alone, so that every process has the same numbers."""

import atexit
import copy
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from kbitcheck.backends.quantization import Quantization
from kbitcheck.models import internals
from kbitcheck.models import load as loading


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to draw. ``config`` holds a ``config.json``'s fields; ``scale`` maps patterns of names to factors.

    ``name`` is for messages; the numbers follow from ``seed`` and the name of each tensor.
    """

    name: str
    seed: str
    config: Mapping[str, Any]
    dtype: str
    scale: Mapping[str, float] = field(default_factory=dict)


_folders: dict[str, Path] = {}


def checkpoint(plan: Plan) -> Path:
    """The directory of the plan's unquantized checkpoint; drawn once a process, removed when the process ends."""
    key = json.dumps([plan.seed, plan.config, plan.dtype, plan.scale], sort_keys=True, default=str)
    folder = _folders.get(key)
    if folder is None or not folder.exists():
        config = loading.configuration(plan.config, name=plan.name)
        with loading.quiet(), loading.errors_as_usage(plan.name):
            model = loading.empty(loading.architecture(config), config)
            fill(model, plan)
            folder = _folders[key] = temporary()
            model.save_pretrained(folder)
    return folder


def load(plan: Plan, quant: Quantization, options: loading.Options) -> PreTrainedModel:
    """The plan's model, each tensor quantized as soon as it is drawn: never more than one is in memory unquantized.

    transformers before 5 reads only from files, so that the whole model is drawn to a temporary checkpoint first.
    """
    if transformers.__version__ < "5":
        return loading.load(checkpoint(plan), quant, options)
    config = loading.configuration(plan.config, name=plan.name)
    with loading.quiet(), loading.errors_as_usage(plan.name):
        model: Any = loading.empty(loading.architecture(config), config)
        model.tie_weights()
        # Of a tied tensor's names only the one that tying reads from is loaded.
        tied = model.all_tied_weights_keys
        drawn = {name: Drawn(draw) for name, draw in tensors(model, plan).items() if name not in tied}
    return loading.stream(drawn, config, quant, options)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A tensor that is drawn when it is read, ``drawn[...]``, as a slice of a safetensors file is."""

    draw: Callable[[], Tensor]

    def __getitem__(self, _: Any) -> Tensor:
        return self.draw()


def fill(model: PreTrainedModel, plan: Plan) -> None:
    """Give numbers to every tensor that a model on the meta device saves, in the dtype that loading keeps it in."""
    model.config.dtype = getattr(torch, plan.dtype)
    for name, draw in tensors(model, plan).items():
        path, _, leaf = name.rpartition(".")
        owner, new = model.get_submodule(path), draw()
        old = getattr(owner, leaf)
        setattr(owner, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    model.tie_weights()


def tensors(model: PreTrainedModel, plan: Plan) -> dict[str, Callable[[], Tensor]]:
    """By name, the function that draws each parameter and saved buffer of a model on the meta device, in any order."""
    dtype = getattr(torch, plan.dtype)
    wide = internals.kept_in_float32(model, dtype)
    tensors: dict[str, Callable[[], Tensor]] = {}
    # A tied tensor has several names, and tying may prefer the one that was not drawn.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = torch.float32 if wide.intersection(name.split(".")) else dtype
        owner = model.get_submodule(name.rpartition(".")[0])
        tensors[name] = partial(_parameter, owner, name, parameter.shape, plan, kept)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:
            tensors[name] = partial(_buffer, f"{plan.seed}/{name}", buffer.shape, buffer.dtype)
    return tensors


def _parameter(owner: nn.Module, name: str, shape: torch.Size, plan: Plan, dtype: torch.dtype) -> Tensor:
    leaf = name.rpartition(".")[2]
    numbers = _numbers(owner, leaf, shape, f"{plan.seed}/{name}")
    numbers *= next((f for pattern, f in plan.scale.items() if fnmatchcase(name, pattern)), 1.0)
    if _is_scale(owner, leaf) and not _adds_one(owner):
        numbers += 1
    return numbers.to(dtype)


def _buffer(seed: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    # Positive, as a running variance has to be.
    return normal(seed, shape).abs().to(dtype)


def normal(seed: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 numbers that depend on ``seed`` and ``shape`` alone; the global generator is not used."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(number % 2**63))


def _numbers(owner: nn.Module, leaf: str, shape: torch.Size, seed: str) -> Tensor:
    """Scales that keep activations near one: 0.2 for norm scales, 0.1 for biases, 1/sqrt(fan in) for weights."""
    # In place, as the largest tensor decides what memory drawing takes.
    if _is_scale(owner, leaf):
        return normal(seed, shape).mul_(0.2)
    if leaf.endswith("bias"):
        return normal(seed, shape).mul_(0.1)
    if len(shape) < 2 or isinstance(owner, nn.Embedding):
        return normal(seed, shape)
    fan_in = shape[0] if type(owner).__name__ == "Conv1D" else shape[-1]
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        fan_in = shape[1:].numel()
    return normal(seed, shape).div_(math.sqrt(fan_in))


def _is_scale(owner: nn.Module, leaf: str) -> bool:
    return leaf == "weight" and "norm" in type(owner).__name__.lower()


def _adds_one(norm: nn.Module) -> bool:
    """Whether a norm scales by ``1 + weight``: then its output is not zero when the weight is."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").eval()
    for tensor in (*probe.parameters(), *probe.buffers()):
        tensor.data.zero_()
    size = next(probe.parameters()).shape[-1]
    try:
        with torch.no_grad():
            output = probe(torch.linspace(-1, 1, size)[None])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):  # it takes more than what it normalizes
        return False
    return bool(output.any())


def temporary() -> Path:
    """A new directory that this process removes when it ends; a model's configuration names it, and nothing names kbitcheck there."""
    folder, process = Path(tempfile.mkdtemp(prefix="model-")), os.getpid()

    def remove() -> None:
        # A forked child inherits this hook, but the folder is its parent's.
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
