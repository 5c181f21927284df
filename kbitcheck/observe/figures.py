"""What a report shows of a case in figures: bytes by group, activations by block, gradient errors by layer. Plain data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kbitcheck.core.anatomy import unquantized
from kbitcheck.core.facts import GradientFacts, MemoryFacts, ModelFacts

GRADIENT_BOUND = 4.0  # yardsticks (KB304)
ADAPTER_PARTS = re.compile(r"\.(lora_\w+|default|weight|bias)(?=\.|$)")


def by_group(model: ModelFacts) -> dict[str, int]:
    """Bytes of quantized weights, of the other parameters by group, and of buffers; each storage once."""
    packed = {t.storage: t.nbytes for t in model.parameters.values() if t.packed}
    groups = {"quantized": sum(packed.values())}
    groups |= {group: sum(t.nbytes for t in tensors) for group, tensors in sorted(unquantized(model).items())}
    owned = {t.storage for t in model.parameters.values()}
    buffers = {t.storage: t.nbytes for t in model.buffers.values() if t.storage not in owned}
    return {**groups, **({"buffers": sum(buffers.values())} if buffers else {})}


def by_block(memory: MemoryFacts) -> dict[str, Any]:
    """Bytes that each block added to what a training step holds, without checkpointing and with it."""
    names = [name for name in memory.plain_steps if name in memory.steps]
    return {
        "blocks": names,
        "plain": [memory.plain_steps[name] for name in names],
        "checkpointed": [memory.steps[name] for name in names],
    }


def by_layer(gradients: Mapping[str, GradientFacts]) -> dict[str, Any]:
    """Relative error of the adapters' gradients against the float64 twin's, and the bound, for each layer's worst."""
    worst: dict[str, tuple[float, float]] = {}
    for name, gradient in gradients.items():
        if gradient.live:
            layer = ADAPTER_PARTS.sub("", name)
            found = (gradient.error, GRADIENT_BOUND * gradient.yardstick)
            worst[layer] = max(worst.get(layer, found), found, key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0)
    return {
        "layers": list(worst),
        "error": [float(f"{error:.3g}") for error, _ in worst.values()],
        "bound": [float(f"{bound:.3g}") for _, bound in worst.values()],
    }
