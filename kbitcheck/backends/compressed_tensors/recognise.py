"""Which layers hold weights of compressed-tensors, packed or unpacked by a forward, and what of a checkpoint is laid out and not run."""

from collections.abc import Mapping
from typing import Any

import torch
from kbitcheck_reference.formats import compressed_tensors as oracle
from torch import nn

from kbitcheck.backends.compressed_tensors.layout import scheme_of
from kbitcheck.backends.packed import PackedHolders
from kbitcheck.core.errors import NotApplicable


class CompressedLayers(PackedHolders):
    """torch's own linear layers to which the library gave a scheme, and a forward that follows it."""

    def holds(self, module: nn.Module) -> bool:
        return oracle.holds(module) or super().holds(module)

    def packs(self, parameter: torch.Tensor) -> bool:
        return oracle.packs(parameter) or super().packs(parameter)

    def packed(self, module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.weight_packed if "weight_packed" in module._parameters else module.weight
        return weight

    def scheme(self, module: Any) -> str:
        return scheme_of(module.quantization_scheme.model_dump()) if oracle.holds(module) else super().scheme(module)

    def state(self, module: Any) -> Mapping[str, Any]:
        if not oracle.holds(module):
            return super().state(module)
        own = {n: t for n, t in module._parameters.items() if n not in ("weight", "weight_packed", "bias")}
        return {**own, "status": module.quantization_status.value}

    def corrupt(self, module: Any, part: str, factor: float = 1.02) -> None:
        if part == "code":
            data = self.packed(module).data
            data.view(torch.int32 if data.dtype == torch.int32 else torch.uint8).view(-1)[0] ^= 1
        elif part == "scale":
            module.weight_scale.data.view(-1)[0] *= factor
        else:
            raise NotApplicable(f"{self.scheme(module)} has no {part}")
