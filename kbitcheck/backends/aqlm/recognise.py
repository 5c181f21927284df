"""Which layers hold AQLM weights: the library's own, and those of a checkpoint that is laid out and not run."""

from collections.abc import Mapping
from typing import Any

import torch
from kbitcheck_reference.formats import aqlm as oracle
from torch import nn

from kbitcheck.backends.packed import PackedHolders
from kbitcheck.core.errors import NotApplicable

LAYER = "aqlm.inference.QuantizedLinear"


class AqlmLayers(PackedHolders):
    """Codes, codebooks and scales, which are parameters."""

    def holds(self, module: nn.Module) -> bool:
        return _runs(module) or super().holds(module)

    def packs(self, parameter: torch.Tensor) -> bool:
        return oracle.packs(parameter) or super().packs(parameter)

    def packed(self, module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.codes if _runs(module) else module.weight
        return weight

    def scheme(self, module: Any) -> str:
        return "aqlm" if _runs(module) else super().scheme(module)

    def state(self, module: Any) -> Mapping[str, Any]:
        return {"codebooks": module.codebooks, "scales": module.scales} if _runs(module) else super().state(module)

    def corrupt(self, module: Any, part: str, factor: float = 1.02) -> None:
        if part == "code":
            module.codes.data.view(-1)[0] ^= 1
        elif part == "scale":
            module.scales.data.view(-1)[0] *= factor
        else:
            raise NotApplicable(f"{self.scheme(module)} has no {part}")


def _runs(module: nn.Module) -> bool:
    codes = module._parameters.get("codes")
    named = any(f"{base.__module__}.{base.__qualname__}" == LAYER for base in type(module).__mro__)
    return named and codes is not None and oracle.packs(codes)
