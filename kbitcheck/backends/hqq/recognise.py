"""Which layers hold HQQ weights: the package's own, and those of a checkpoint that is laid out and not run."""

from collections.abc import Mapping
from typing import Any

import hqq.core.quantize  # before a subject that may patch it
import torch
from kbitcheck_reference.formats import hqq as oracle
from torch import nn

from kbitcheck.backends.packed import PackedHolders
from kbitcheck.core.errors import NotApplicable

LAYER = hqq.core.quantize.HQQLinear
# What a weight is unpacked by. A state dict brings back more: how the weight was once quantized.
STATE = ("scale", "zero", "nbits", "group_size", "axis", "shape", "packing", "view_as_float", "compute_dtype")


class HqqLayers(PackedHolders):
    """``HQQLinear`` with codes, a scale and a zero; one whose scales or zeros are quantized again is not judged."""

    def holds(self, module: nn.Module) -> bool:
        return oracle.holds(module) or super().holds(module)

    def packs(self, parameter: torch.Tensor) -> bool:
        return oracle.packs(parameter) or super().packs(parameter)

    def packed(self, module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.W_q if oracle.holds(module) else module.weight
        return weight

    def scheme(self, module: Any) -> str:
        return f"hqq-int{module.meta['nbits']:g}" if oracle.holds(module) else super().scheme(module)

    def state(self, module: Any) -> Mapping[str, Any]:
        if not oracle.holds(module):
            return super().state(module)
        return {name: module.meta[name] for name in STATE if name in module.meta}

    def corrupt(self, module: Any, part: str, factor: float = 1.02) -> None:
        if part == "code":
            module.W_q.data.view(torch.uint8).view(-1)[0] ^= 1
        elif part == "scale":
            module.meta["scale"].view(-1)[0] *= factor
        else:
            raise NotApplicable(f"{self.scheme(module)} has no {part}")
