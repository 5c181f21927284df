"""Quantization backends: one folder each, behind one protocol. Importing this imports no torch.

The functions here ask whichever backend holds the module that they are passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.protocol import Arithmetic, Backend, Packing, Recognition
from kbitcheck.backends.registry import available

if TYPE_CHECKING:
    from torch import Tensor, nn


def load() -> None:
    """Import every available backend's library, before a subject is imported that may patch it."""
    for backend in available():
        _ = backend.recognition, backend.arithmetic, backend.packing, backend.kernels


def of(module: nn.Module) -> Backend | None:
    """The backend that holds a packed weight in the module; None for an unquantized one."""
    return next((backend for backend in available() if backend.recognition.holds(module)), None)


def is_quantized(module: nn.Module) -> bool:
    """Whether any backend holds a packed weight in the module."""
    return of(module) is not None


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter is a packed weight."""
    return any(backend.recognition.packs(parameter) for backend in available())


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of everything that holds a packed weight: layers, and what others read an unpacked weight from."""
    recognitions = [backend.recognition for backend in available()]
    return ((n, m) for n, m in model.named_modules() if any(each.holds(m) for each in recognitions))


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every quantized layer: of the holders, those that take an input and multiply it."""
    return ((n, m) for n, m in holders(model) if recognition(m).multiplies(m))


def stacks(module: nn.Module) -> dict[str, tuple[str, tuple[int, int]]]:
    """Scheme and unpacked shape of the module's parameters that pack the weights of several experts, by name."""
    return {n: each for backend in available() for n, each in backend.recognition.stacks(module).items()}


def emptied_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, module and scheme of every quantized layer whose weight something else holds now, as FSDP does."""
    recognitions = [backend.recognition for backend in available()]
    return ((n, m, scheme) for n, m in model.named_modules() for each in recognitions if (scheme := each.emptied(m)))


def emptied_schemes(model: nn.Module) -> set[str]:
    """The schemes of such layers."""
    return {scheme for _, _, scheme in emptied_layers(model)}


def promises_upcast(module: nn.Module) -> bool:
    """Whether preparations promise float32 around a quantized layer, by its backend."""
    return _holder(module).promises_upcast


def recognition(module: nn.Module) -> Recognition:
    """What its backend says of a quantized layer."""
    return _holder(module).recognition


def arithmetic(module: nn.Module) -> Arithmetic:
    """How a quantized layer computes, by its backend."""
    return _holder(module).arithmetic


def _holder(module: nn.Module) -> Backend:
    backend = of(module)
    if backend is None:
        raise TypeError(f"{type(module).__name__} is no quantized layer")
    return backend


def compute_dtypes(model: nn.Module) -> set[Any]:
    """The dtypes in which a model's quantized layers compute, whatever their inputs; None stands for those that follow them."""
    layers = [(arithmetic(m), m) for _, m in quantized_layers(model)]
    return {own.compute_dtype(m) or own.fixed_dtype(m) for own, m in layers}


def multiply_unpacked(model: nn.Module) -> bool:
    """Whether all quantized layers of a model give the bits of torch's own product with their unpacked weight, on a CPU."""
    return all(arithmetic(module).multiplies_unpacked for _, module in quantized_layers(model))


def packing(module: nn.Module) -> Packing:
    """What its backend says of how a quantized layer is packed."""
    return _holder(module).packing


def steady(model: Any) -> Any:
    """The model, with what would make it depend on the machine or on earlier calls switched off in every backend."""
    for backend in available():
        backend.steady(model)
    return model


def unsteady(model: Any) -> str:
    """What ``steady`` switched off that would change a user's training on this machine; "" if nothing."""
    return "; ".join(filter(None, (backend.unsteady(model) for backend in available())))


def release(model: Any) -> None:
    """Undo ``steady`` in every backend."""
    for backend in available():
        backend.release(model)
