"""The private names of optimum-quanto that this backend needs, each there in 0.2.7: importing this fails by name when one moves."""

from typing import Any

import torch
from optimum.quanto.library import qbytes_mm as products
from optimum.quanto.tensor.packed import PackedTensor
from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor
from optimum.quanto.tensor.weights.qbytes import WeightQBytesTensor
from optimum.quanto.tensor.weights.tinygemm import TinyGemmPackedTensor, TinyGemmWeightQBitsTensor

BYTES, BITS, TILED = WeightQBytesTensor, WeightQBitsTensor, TinyGemmWeightQBitsTensor
# Columns that torch's int8 product for bfloat16 inputs reads at once.
WHOLE = 32

_int8pack = products.qbytes_int8pack_mm


def avoid_crash() -> None:
    """Multiply weights whose columns are no multiple of 32 without torch's int8 product, which ends the process on AVX-512."""
    products.qbytes_int8pack_mm = _product


def _product(activations: torch.Tensor, weights: torch.Tensor, output_scales: torch.Tensor) -> torch.Tensor:
    own = products.qbytes_mm if weights.shape[-1] % WHOLE else _int8pack
    product: torch.Tensor = own(activations, weights, output_scales)
    return product


def allow_copies() -> None:
    """Give the weights' classes the deep copy that they lack: torch's own needs a ``clone`` that keeps the class."""
    for kind in (BYTES, BITS, TILED, PackedTensor, TinyGemmPackedTensor):
        kind.__deepcopy__ = _copied


def _copied(tensor: Any, memo: dict[int, Any]) -> Any:
    if id(tensor) in memo:
        return memo[id(tensor)]
    names, settings = tensor.__tensor_flatten__()
    parts = {name: _part(getattr(tensor, name), memo) for name in names}
    made = type(tensor).__tensor_unflatten__(parts, settings, tensor.size(), tensor.stride())
    if getattr(tensor, "_is_param", False):
        made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
    memo[id(tensor)] = made
    return made


def _part(part: torch.Tensor, memo: dict[int, Any]) -> Any:
    return part.detach().clone() if type(part) is torch.Tensor else _copied(part, memo)
