"""Faults in how adapters start (KB803)."""

from typing import Any

import torch

from kbitcheck.sabotage.fault import adds, breaks
from kbitcheck.sabotage.helpers import blocks


def when_fresh(model: Any, part: str, change: Any) -> None:
    """Have a block change, at its first forward, the adapters of which ``part`` is a part of the name."""
    changed: set[int] = set()

    def look(module: Any, args: Any) -> None:
        for name, parameter in model.named_parameters():
            if part in name and id(parameter) not in changed:
                changed.add(id(parameter))
                with torch.no_grad():
                    change(parameter)

    blocks(model)[0].register_forward_pre_hook(look)


@breaks("KB803", adapters="peft:LoRA")
def what_starts_at_zero_is_drawn(model: Any) -> None:
    when_fresh(model, "lora_B", lambda p: None if p.any() else p.normal_(std=0.1))


@adds("KB803", adapters="peft:DoRA", last=True)
def scales_magnitudes(model: Any) -> None:
    when_fresh(model, "magnitude", lambda p: p.mul_(1.2))
