"""Cast parameters to float32 in place, keeping values, names, identity, strides and shared storage."""

from collections.abc import Iterable

import torch
from torch import nn

from .quantized import is_foreign_layer, is_quantized_parameter

HALF_DTYPES = frozenset({torch.float16, torch.bfloat16})


def castable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that KB201 and KB202 want in float32, each once, and no other (KB204, KB205, KB206, KB603).

    Every unquantized float16 or bfloat16 parameter. Left out: packed weights, whatever dtype they are stored in, and all
    that a packed layer of a backend without a format here owns.
    """
    foreign = {id(p) for m in model.modules() if is_foreign_layer(m) for p in m.parameters(recurse=False)}
    half = (p for p in model.parameters() if p.dtype in HALF_DTYPES)
    return [p for p in half if id(p) not in foreign and not is_quantized_parameter(p)]


def upcast(parameters: Iterable[nn.Parameter]) -> None:
    """Cast parameters to float32 exactly, one storage at a time (KB203, KB208, KB508, KB601).

    Every float16 and bfloat16 number is a float32 number, so no value changes. The data moves beneath the parameter
    objects: names, identity, ties and hooks survive. Parameters that are views of one storage stay views of one.
    Peak memory is what it was, plus what was added so far, plus the old storage of the one being cast. Gradients, if
    any, are left alone.
    """
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(_storage_key(parameter), []).append(parameter)
    for views in groups.values():
        if len(views) == 1 or views[0].is_meta:
            for parameter in views:
                parameter.data = parameter.data.to(torch.float32)
        else:
            _upcast_views(views)


def _storage_key(parameter: nn.Parameter) -> object:
    if parameter.is_meta or hasattr(type(parameter.data), "__tensor_flatten__"):
        return id(parameter)
    return parameter.device, parameter.dtype, parameter.untyped_storage().data_ptr()


def _upcast_views(views: list[nn.Parameter]) -> None:
    """Cast the span of one storage that the views cover, and cut the same views from the result."""
    start = min(view.storage_offset() for view in views)
    stop = max(view.storage_offset() + _extent(view) for view in views)
    span = views[0].data.as_strided((stop - start,), (1,), start).to(torch.float32)
    for view in views:
        view.data = span.as_strided(view.shape, view.stride(), view.storage_offset() - start)


def _extent(tensor: torch.Tensor) -> int:
    """Elements of storage between a strided tensor's first and last element, both included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
