"""Which layers hold GPTQ weights: GPTQModel's own layer of plain torch, and those of a checkpoint that is laid out and not run."""

from collections.abc import Mapping
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear import torch as layers  # before a subject that may patch it
from torch import nn

from kbitcheck.backends.packed import PackedHolders
from kbitcheck.core.errors import NotApplicable

LAYER = layers.TorchLinear
STATE = ("qzeros", "scales", "g_idx")


class GptqLayers(PackedHolders):
    """The packed tensors are buffers."""

    def holds(self, module: nn.Module) -> bool:
        return _runs(module) or super().holds(module)

    def packed(self, module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.qweight if _runs(module) else module.weight
        return weight

    def scheme(self, module: Any) -> str:
        return f"gptq-int{module.bits}" if _runs(module) else super().scheme(module)

    def state(self, module: Any) -> Mapping[str, Any]:
        if not _runs(module):
            return super().state(module)
        plain = {"bits": module.bits, "group_size": module.group_size, "version": module.qzero_format()}
        return {**{name: getattr(module, name) for name in STATE}, **plain}

    def corrupt(self, module: Any, part: str, factor: float = 1.02) -> None:
        if part == "code":
            module.qweight.view(-1)[0] ^= 1
        elif part == "scale":
            module.scales.view(-1)[0] *= factor
        else:
            raise NotApplicable(f"{self.scheme(module)} has no {part}")


def _runs(module: nn.Module) -> bool:
    words = module._buffers.get("qweight")
    return isinstance(module, LAYER) and words is not None and not words.is_floating_point()
