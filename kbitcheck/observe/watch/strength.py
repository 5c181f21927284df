"""By how much adapters multiply what they add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Real

from kbitcheck_reference.adapters import is_adapter_module
from torch import nn


def scalings(model: nn.Module) -> dict[str, float]:
    """The scaling of each active low-rank adapter, by module; of several the largest."""
    scales = ((name, [*_scales(module)]) for name, module in model.named_modules() if is_adapter_module(module))
    return {name: max(several, key=abs) for name, several in scales if several}


def _scales(module: nn.Module) -> Iterator[float]:
    scaling = getattr(module, "scaling", None)
    if isinstance(scaling, Mapping):  # PEFT's, by adapter
        scaling = [scaling.get(name) for name in getattr(module, "active_adapters", ())]
    for scale in scaling if isinstance(scaling, list) else [scaling]:
        if isinstance(scale, Real):
            yield float(scale)
