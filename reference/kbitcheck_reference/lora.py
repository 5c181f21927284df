"""Put the minimal LoRA on a model, draw, save, load and detach it: the same on every device and in every twin."""

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .lora_layer import LoraLinear, LoraStack, is_conv1d
from .quantized import is_quantized

ModelT = TypeVar("ModelT", bound=nn.Module)

HEADS = frozenset({"lm_head", "score", "classifier"})
_SCALING = "scaling"


def attach(
    model: ModelT,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    dropout: float = 0.0,
    targets: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ModelT:
    """Freeze the base and put a LoRA pair on its linear layers, in place.

    What is drawn depends on ``seed`` and the layer's name alone; no global random state is read or touched.

    Args:
        model: the model, prepared or not.
        rank: inner size of each pair.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: probability, on the adapters' inputs.
        targets: layers to wrap, by the last components of their path (``q_proj``, ``mlp.up_proj``), and parametrized stacks of
            experts (``parametrizations.gate_up_proj``). By default every quantized linear layer, or every linear layer where
            none is quantized, the output head left out.
        dtype: dtype of the pairs.
        seed: of the draw of every ``lora_A``.

    Returns:
        The very object that was given.

    Raises:
        ValueError: adapters are on already, or nothing, or no layer for one of the targets, was found.
    """
    if layers(model):
        raise ValueError(f"{type(model).__name__} carries LoRA layers already; detach them first")
    chosen = _default_targets(model) if targets is None else _named_targets(model, targets)
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no linear layer to put adapters on")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wrapped = {
        base: (LoraStack if _is_stack(name) else LoraLinear)(
            base, rank=rank, alpha=alpha, dropout=dropout, dtype=dtype, seed=_seed_of(seed, name)
        )
        for name, base in chosen.items()
    }
    _replace_children(model, wrapped)
    return model


def detach(model: ModelT) -> ModelT:
    """Take the adapters off, in place, and put the very base layers back; what ``attach`` froze stays frozen."""
    _replace_children(model, {layer: layer.base_layer for layer in layers(model).values()})
    return model


def layers(model: nn.Module) -> dict[str, Any]:
    """Map the full name of every LoRA layer to the layer: a ``LoraLinear``, or a ``LoraStack`` of experts."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (LoraLinear, LoraStack))}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Map the full name (``...q_proj.lora_A.weight``) of every adapter parameter to the parameter."""
    return {
        f"{name}.{half}.weight": getattr(layer, half).weight
        for name, layer in layers(model).items()
        for half in ("lora_A", "lora_B")
    }


def save(model: nn.Module, path: str | Path) -> None:
    """Write the adapters' parameters, by full name, and their scaling to a safetensors file; an existing one is replaced.

    Raises:
        ValueError: the model carries no adapters.
    """
    tensors = {name: parameter.detach().contiguous() for name, parameter in parameters(model).items()}
    save_file(tensors, str(path), metadata={_SCALING: _scaling(model)})


def load(model: nn.Module, path: str | Path) -> None:
    """Read what ``save`` wrote into a model with the same targets, rank and alpha; nothing changes unless all of it fits.

    Raises:
        ValueError: names, shapes or scaling differ, or the model carries no adapters; says which.
    """
    wanted = parameters(model)
    scaling = _scaling(model)
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        saved_scaling = (file.metadata() or {}).get(_SCALING)
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} in the file and {tuple(parameter.shape)} in the model"
        for name, parameter in wanted.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if not problems and saved_scaling != scaling:
        problems.append(f"scaling is {saved_scaling} in the file and {scaling} in the model")
    if problems:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    for name, parameter in wanted.items():
        parameter.data.copy_(tensors[name])


def _scaling(model: nn.Module) -> str:
    scalings = {layer.scaling for layer in layers(model).values()}
    if len(scalings) != 1:
        raise ValueError(f"{type(model).__name__} carries no adapters; call attach first")
    return repr(scalings.pop())


def _seed_of(seed: int, name: str) -> int:
    # Hashed together, because torch's generator on the CPU reads the low 32 bits of a seed alone.
    return zlib.crc32(f"{seed}/{name}".encode())


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    return is_quantized(module) and hasattr(module, "in_features") and hasattr(module, "out_features")


def _is_stack(name: str) -> bool:
    """Whether a module of this name stands for a parameter, a stack of weights, that its owner reads through torch's parametrization."""
    return name.split(".")[-2:-1] == ["parametrizations"]


def _default_targets(model: nn.Module) -> dict[str, nn.Module]:
    pretrained: Any = model
    head = pretrained.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module) and module is not head and not HEADS & set(name.split("."))
    }
    return {name: module for name, module in linears.items() if is_quantized(module)} or linears


def _named_targets(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Module]:
    by_ending: dict[str, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if _is_linear(module) or _is_stack(name):
            parts = name.split(".")
            for start in range(len(parts)):
                by_ending.setdefault(".".join(parts[start:]), {})[name] = module
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        matches = by_ending.get(target, {})
        if not matches:
            raise ValueError(f"{type(model).__name__} has no linear layer named {target!r}")
        chosen |= matches
    return chosen


def _replace_children(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules wherever they are registered, shared ones in every place."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
