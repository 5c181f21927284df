"""Quantization backends: one folder each, behind one protocol. Importing this imports no torch.

The functions here ask whichever backend holds the module that they are passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.protocol import Backend
from kbitcheck.backends.registry import available

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["Backend", "available", "of", "of_parameter"]


def load() -> None:
    """Import every available backend's library, before a subject is imported that may patch it."""
    for backend in available():
        _ = backend.recognition, backend.arithmetic, backend.packing, backend.kernels


def of(module: nn.Module) -> Backend | None:
    """The backend that holds a packed weight in the module; None for an unquantized one."""
    return next((backend for backend in available() if backend.recognition.holds(module)), None)


def of_parameter(parameter: Tensor) -> Backend | None:
    """The backend whose packed weight the parameter is; None for plain numbers."""
    return next((backend for backend in available() if backend.recognition.packs(parameter)), None)


def is_quantized(module: nn.Module) -> bool:
    """Whether any backend holds a packed weight in the module."""
    return of(module) is not None


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter is a packed weight."""
    return of_parameter(parameter) is not None


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every quantized layer."""
    return ((name, module) for name, module in model.named_modules() if is_quantized(module))


def _holder(module: nn.Module) -> Backend:
    backend = of(module)
    if backend is None:
        raise TypeError(f"{type(module).__name__} is no quantized layer")
    return backend


def scheme(module: nn.Module) -> str:
    """Name of the scheme that quantized the layer."""
    return _holder(module).recognition.scheme(module)


def shape(module: nn.Module) -> tuple[int, int]:
    """(out features, in features) of the unpacked weight."""
    return _holder(module).recognition.shape(module)


def state(module: nn.Module) -> Mapping[str, Any]:
    """The fields of the quantization state by name."""
    return _holder(module).recognition.state(module)


def scratch(module: nn.Module) -> list[Tensor]:
    """Tensors that the layer's own kernels keep from one call to the next."""
    return _holder(module).recognition.scratch(module)


def bare(module: nn.Module) -> nn.Module:
    """The library's own layer on the same weight and state, without hooks."""
    return _holder(module).recognition.bare(module)


def corrupt(module: nn.Module, part: str, factor: float = 1.02) -> None:
    """Break the packed weight in place: its ``code``, a ``scale`` (times ``factor``) or its ``nested`` state."""
    _holder(module).recognition.corrupt(module, part, factor)


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the layer's products; None where they follow the layer's input."""
    return _holder(module).arithmetic.compute_dtype(module)


def unpacked_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that the layer's backward unpacks the weight to; None where that is float32."""
    return _holder(module).arithmetic.unpacked_dtype(module)


def unpacked(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as the layer's own kernels unpack it, (out, in)."""
    return _holder(module).arithmetic.unpacked(module, dtype)


def exact(module: nn.Module, out: Tensor | None = None) -> Tensor:
    """The weight in float64, (out, in), as its format says."""
    return _holder(module).arithmetic.exact(module, out)


def rounds_input(module: nn.Module) -> bool:
    """Whether some kernel of the layer rounds its input."""
    return _holder(module).arithmetic.rounds_input(module)


def round_input(module: nn.Module, x: Tensor) -> Tensor:
    """The input that the layer really computes with in training."""
    return _holder(module).arithmetic.round_input(module, x)


def bias_after_forward(module: nn.Module) -> Tensor:
    """The layer's bias as a forward leaves it."""
    return _holder(module).arithmetic.bias_after_forward(module)


def steady(model: Any) -> Any:
    """The model, with what would make it depend on the machine or on earlier calls switched off in every backend."""
    for backend in available():
        backend.steady(model)
    return model
