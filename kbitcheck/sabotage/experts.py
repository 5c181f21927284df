"""Faults in stacks of experts that are packed in 4 bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.sabotage.fault import breaks
from kbitcheck.sabotage.helpers import corrupt, subclass

STACKED = {"model": "tiny:gpt-oss", "quant": "nf4,experts=parametrize"}


def stacks(model: Any, name: str = "") -> list[Any]:
    """The packed stacks of experts that are called so."""
    held = backends.holders(model)
    return [m for n, m in held if n.endswith(name) and not backends.recognition(m).multiplies(m)]


class Reads(nn.Module):
    """What an owner reads of a stack, changed by a function."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        return self.change(weights)


@breaks("KB205", **STACKED)
def a_code_of_an_expert_flipped(model: Any) -> None:
    corrupt(stacks(model)[2], "code")


@breaks("KB206", **STACKED)
def one_experts_scale_off(model: Any) -> None:
    stack = stacks(model, "down_proj")[1]
    scales = backends.recognition(stack).state(stack)["absmax"]
    scales[-1] *= 1.02


@breaks("KB206", model="tiny:gpt-oss", quant="fp4,double,experts=parametrize")
def scales_of_experts_rounded_to_half(model: Any) -> None:
    for stack in stacks(model):
        scales = backends.recognition(stack).state(stack)["nested.absmax"]
        scales.copy_(scales.half())


@breaks("KB207", **STACKED)
def experts_unpacked_for_good(model: Any) -> None:
    for module in list(model.modules()):
        if "down_proj" in getattr(module, "parametrizations", {}):
            unpacked = module.down_proj.detach().clone()
            nn.utils.parametrize.remove_parametrizations(module, "down_proj", leave_parametrized=False)
            module.down_proj = nn.Parameter(unpacked, requires_grad=False)


@breaks("KB209", **STACKED)
def an_expert_transposed(model: Any) -> None:
    def transpose(weights: torch.Tensor) -> torch.Tensor:
        return torch.cat([weights[:1].transpose(1, 2), weights[1:]])

    stacks(model, "down_proj")[1].append(Reads(transpose))


@breaks("KB304", checkpointing="off", **STACKED)
def an_expert_without_a_backward(model: Any) -> None:
    def forward(self: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        run = super(type(self), self).forward
        own = (chosen == 0).to(weights.dtype)
        passed: torch.Tensor = run(hidden, chosen, weights * (1 - own))
        cut: torch.Tensor = run(hidden.detach(), chosen, weights * own)
        return passed + cut

    owner = next(m for m in model.modules() if "down_proj" in getattr(m, "parametrizations", {}))
    subclass(owner, forward=forward)
