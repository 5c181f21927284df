"""Layers of a library that keep a packed weight and what unpacks it in buffers, the words of codes in ``qweight``."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from kbitcheck.backends.packed import PackedHolders
from kbitcheck.core.errors import NotApplicable


class BufferedLayers(PackedHolders):
    """Layers of a class that is known by its name, so that nothing here imports the library, and those that are laid out and not run."""

    cls: ClassVar[str]
    prefix: ClassVar[str]
    tensors: ClassVar[Sequence[str]]

    def runs(self, module: nn.Module) -> bool:
        """Whether a module is the library's and its weight is packed."""
        words = module._buffers.get("qweight")
        if words is None or words.is_floating_point():
            return False
        return any(f"{base.__module__}.{base.__qualname__}" == self.cls for base in type(module).__mro__)

    def plain(self, module: Any) -> Mapping[str, Any]:
        """What of a layer's state is no tensor."""
        return {"bits": module.bits, "group_size": module.group_size}

    def holds(self, module: nn.Module) -> bool:
        return self.runs(module) or super().holds(module)

    def packed(self, module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.qweight if self.runs(module) else module.weight
        return weight

    def scheme(self, module: Any) -> str:
        return f"{self.prefix}{module.bits}" if self.runs(module) else super().scheme(module)

    def state(self, module: Any) -> Mapping[str, Any]:
        if not self.runs(module):
            return super().state(module)
        return {**{name: getattr(module, name) for name in self.tensors}, **self.plain(module)}

    def corrupt(self, module: Any, part: str, factor: float = 1.02) -> None:
        if part == "code":
            module.qweight.view(-1)[0] ^= 1
        elif part == "scale":
            module.scales.view(-1)[0] *= factor
        else:
            raise NotApplicable(f"{self.scheme(module)} has no {part}")
