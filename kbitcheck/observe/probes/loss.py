"""A loss for a model whose output has none: steps need one number to go backward from."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from kbitcheck.core.errors import Unavailable, UsageError
from kbitcheck.observe.probes import kv_cache
from kbitcheck.observe.probes.float64 import KeepFloat64
from kbitcheck.observe.probes.live import tensors

LossOf = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class GiveLoss:
    """A forward hook on a whole model: the output gets a loss and logits where the model gives none.

    ``loss_of`` makes the loss of an output. Without it, the loss is that of the output; in a tuple, a first element that is
    one number. An output without a loss gets one that depends on every floating tensor in it.
    """

    loss_of: LossOf | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        logits: torch.Tensor | None = getattr(output, "logits", None)
        if logits is not None and _own(output) is not None and self.loss_of is None:
            return output
        floating = [t for t in tensors(kv_cache.without_cache(output)) if t.is_floating_point()]
        if not floating:
            raise Unavailable(f"the model returns {type(output).__name__} without a floating tensor: give loss=")
        if logits is None:
            logits = next((t for t in floating if t.dim()), floating[0])
        return CausalLMOutputWithPast(
            loss=self._loss(output, floating), logits=logits, **{kv_cache.OUTPUT: kv_cache.cache_of(output)}
        )

    def _loss(self, output: Any, floating: list[torch.Tensor]) -> torch.Tensor:
        if self.loss_of is not None:
            of_twin = any(t.dtype == torch.float64 for t in floating)
            with KeepFloat64() if of_twin else nullcontext():
                loss = self.loss_of(output)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
                raise UsageError(f"loss= returns {type(loss).__name__}, not one number in a tensor")
            own_loss: torch.Tensor = loss.reshape(())
            return own_loss
        own = _own(output)
        if own is None and isinstance(output, (tuple, list)) and not floating[0].dim():
            own = floating[0]
        return drawn_loss(floating) if own is None else own


def _own(output: Any) -> torch.Tensor | None:
    """The loss of an output; what is no tensor is none: before transformers 5 accelerate's copy of one without a loss has a dictionary."""
    own = getattr(output, "loss", None)
    return own if isinstance(own, torch.Tensor) else None


def drawn_loss(outputs: list[torch.Tensor]) -> torch.Tensor:
    """A loss that every element of every tensor changes by another amount: half the mean of drawn multiples, squared.

    Multiples differ, as the sum of squares of what a norm returns is constant. They are exact in every floating dtype.
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), device=outputs[0].device)
    for output in outputs:
        multiples = torch.randint(32, 97, output.shape, generator=generator) / 64.0
        wide = output if output.dtype == torch.float64 else output.float()
        total = total + (wide * multiples.to(wide)).square().mean() / 2
    return total
