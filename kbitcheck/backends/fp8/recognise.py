"""Which layers hold fine-grained FP8 weights: transformers' own, and those of a checkpoint that is laid out and not run."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kbitcheck.backends.fp8 import internals
from kbitcheck.backends.packed import PackedHolders
from kbitcheck.core.errors import NotApplicable


class Fp8Layers(PackedHolders):
    """``FP8Linear`` with e4m3 numbers; a layer of several groups is another product, and is not judged."""

    def holds(self, module: nn.Module) -> bool:
        return _runs(module) or super().holds(module)

    def packs(self, parameter: torch.Tensor) -> bool:
        return parameter.dtype == torch.float8_e4m3fn or super().packs(parameter)

    def scheme(self, module: Any) -> str:
        return "fp8" if _runs(module) else super().scheme(module)

    def state(self, module: Any) -> Mapping[str, Any]:
        if not _runs(module):
            return super().state(module)
        block = None if module.block_size is None else tuple(module.block_size)
        return {
            "weight_scale_inv": module.weight_scale_inv,
            "activation_scale": module.activation_scale,
            "block_size": block,
            "activation_scheme": module.activation_scheme,
        }

    def corrupt(self, module: Any, part: str, factor: float = 1.02) -> None:
        if part == "code":
            module.weight.data.view(torch.uint8).view(-1)[0] ^= 1
        elif part == "scale":
            module.weight_scale_inv.data.view(-1)[0] *= factor
        else:
            raise NotApplicable(f"{self.scheme(module)} has no {part}")


def _runs(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    kind = isinstance(module, internals.LAYER) and not isinstance(module, internals.GROUPED)
    return kind and weight is not None and weight.dtype == torch.float8_e4m3fn
