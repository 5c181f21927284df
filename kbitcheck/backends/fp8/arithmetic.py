"""How transformers' FP8 layers compute: the forward rounds its input, the backward multiplies by the unpacked weight."""

from typing import Any

import torch
from kbitcheck_reference.formats import fp8 as oracle
from torch import Tensor, nn

from kbitcheck.backends.protocol import Arithmetic


class Fp8Arithmetic(Arithmetic):
    """Products follow the input. The backward unpacks to the gradient's dtype, codes and scales each rounded to it."""

    def unpacked(self, module: Any, dtype: torch.dtype | None = None) -> Tensor:
        scale = module.weight_scale_inv.detach()
        return _unpacked(module.weight.detach(), scale, module.block_size, dtype or torch.float32)

    def rounds_input(self, module: nn.Module) -> bool:
        return True

    def input_ulp(self, module: nn.Module) -> float:
        return torch.finfo(oracle.CODES).eps

    def round_input(self, module: Any, x: Tensor) -> Tensor:
        if module.activation_scale is not None:
            scale = module.activation_scale.detach().float()
            codes = (x.float() / scale).clamp(-oracle.LARGEST, oracle.LARGEST).to(oracle.CODES)
            rounded: Tensor = codes.float() * scale
            return rounded.to(x.dtype)
        columns = x.shape[-1] if module.block_size is None else module.block_size[1]
        return oracle.round_input(x, columns).to(x.dtype)


def product(
    x: Tensor, weight: Tensor, scale: Tensor, block: Any, dtype: torch.dtype, *, activation_scale: Tensor | None = None
) -> Tensor:
    """What the GPU kernel computes, in plain float32: the product of the rounded input and the unpacked weight."""
    if activation_scale is not None:
        raise NotImplementedError("inputs with one scale of their own are rounded by the GPU kernel alone")
    rounded = oracle.round_input(x, x.shape[-1] if block is None else block[1])
    return (rounded @ _unpacked(weight, scale, block, torch.float32).T).to(dtype)


def _unpacked(codes: Tensor, scale: Tensor, block: Any, dtype: torch.dtype) -> Tensor:
    values, factor = codes.to(dtype), scale.to(dtype)
    if block is None:
        return values * factor
    (rows, columns), (high, wide) = codes.shape, block
    return values * factor.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
