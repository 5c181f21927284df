"""What a report shows of a case in figures: bytes by group, activations by block, gradient errors by layer. Plain data."""

import re
from collections.abc import Container, Mapping
from math import isfinite, prod
from typing import Any

from torch import Tensor

from kbitcheck.core.anatomy import unquantized
from kbitcheck.core.facts import Facts, Gap, MemoryFacts, ModelFacts, median_yardstick
from kbitcheck.models.inputs.choose import kinds
from kbitcheck.observe.uses.subject import USES

GRADIENT_BOUND = 4.0  # yardsticks (KB304)
ADAPTER_PARTS = re.compile(r"\.(lora_\w+|default|weight|bias)(?=\.|$)")


def summary(facts: Facts, computed: Container[str], batch: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """The figures of a case; ``computed`` names the facts and stages that are there, ``batch`` is what was fed, if anything."""
    base = facts.base
    quantized = sum(layer.in_features * layer.out_features for layer in base.layers.values())
    others = {t.storage: t for t in base.parameters.values() if not t.packed}
    figures: dict[str, Any] = {
        "model_class": base.cls,
        "parameters": quantized + sum(prod(t.shape) for t in others.values()),
        "quantized": quantized,
        "unquantized_bytes": sum(t.nbytes for t in others.values()),
        "bytes_loaded": base.nbytes,
    }
    if facts.recipe is not None:
        figures["recipe"] = str(facts.recipe)
    if batch is not None:
        figures["inputs"] = kinds(batch)
    if "cut" in computed and (facts.cut.towers or facts.cut.reason):
        figures["cut"] = facts.cut.as_json()
    if "prepared" in computed:
        figures["bytes_prepared"] = facts.prepared.nbytes
        figures["bytes_by_group"] = {"loaded": by_group(base), "prepared": by_group(facts.prepared)}
    if "forecast" in computed and facts.forecast.activations:
        figures["forecast"] = facts.forecast.as_json()
    if "gradients" in computed:
        figures["adapters"] = len(facts.gradients)
        figures["dead_adapters"] = sum(not g.live for g in facts.gradients.values())
        figures["gradient_errors"] = by_layer(facts.gradients)
    if batch is not None and "memory" in computed:
        figures |= {"activations": facts.memory.plain, "checkpointed": facts.memory.held}
        figures["batch"] = list(next(iter(batch.values())).shape[:2])
        figures["activations_by_block"] = by_block(facts.memory)
    if "training" in computed:
        figures["losses"], figures["predicted_changes"] = list(facts.training.losses), list(facts.training.predicted)
    return figures | _drawn(facts, computed)


def _drawn(facts: Facts, computed: Container[str]) -> dict[str, Any]:
    """What was drawn of the conditions that there are."""
    drawn: dict[str, Any] = {}
    if "drawn" in computed:
        drawn["drawn"] = facts.drawn.conditions
    if "later" in computed:
        drawn["looks"] = ", ".join(facts.later.looks)
    if "uses" in computed:
        drawn["uses"] = {"drawn": sorted({seen.use for seen in facts.uses}), "of": len(USES)}
    return drawn


def by_group(model: ModelFacts) -> dict[str, int]:
    """Bytes of quantized weights, of the other parameters by group, and of buffers; each storage once."""
    packed = {t.storage: t.nbytes for t in model.packed.values()}
    groups = {"quantized": sum(packed.values())}
    groups |= {group: sum(t.nbytes for t in tensors) for group, tensors in sorted(unquantized(model).items())}
    owned = {t.storage for t in (*model.parameters.values(), *model.packed.values())}
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


def by_layer(gradients: Mapping[str, Gap]) -> dict[str, Any]:
    """Relative error of the adapters' gradients against the float64 twin's, and the bound, for each layer's worst."""
    worst: dict[str, tuple[float, float]] = {}
    least = median_yardstick(gradients.values())
    for name, gradient in gradients.items():
        if gradient.live and isfinite(gradient.yardstick):
            layer = ADAPTER_PARTS.sub("", name)
            error = (gradient.error, GRADIENT_BOUND * max(gradient.yardstick, least))
            worst[layer] = max(worst.get(layer, error), error, key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0)
    return {
        "layers": list(worst),
        "error": [float(f"{error:.3g}") for error, _ in worst.values()],
        "bound": [float(f"{bound:.3g}") for _, bound in worst.values()],
    }
