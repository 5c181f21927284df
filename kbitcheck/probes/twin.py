"""Float twins: the base with every quantized layer replaced by its unpacked weights, read before anything ran."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from kbitcheck import backends
from kbitcheck.probes import step
from kbitcheck.probes.snapshot import norm_evidence

STEPS = 4
LEARNING_RATES = (5e-3, 5e-4, 5e-5, 5e-6, 5e-7)
WEIGHT_DECAY = 0.1
# Adam moves every parameter by about its learning rate, however small the gradient: a large epsilon keeps those whose
# gradient is rounding noise from walking at random.
EPSILON = 1e-3


class _Product(torch.autograd.Function):
    """``x @ weight.T``, whose backward uses another rounding of the same weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, backward_weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = backward_weight
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ ctx.weight, None, None


class TwinLinear(nn.Linear):
    """A quantized layer's arithmetic with a plain weight (out, in): compute in ``compute``, answer in the input's dtype.

    bitsandbytes' 4-bit backward unpacks the weight to the quantization state's dtype first and its forward does not;
    ``backward_weight`` is that rounding, where it differs.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        compute: torch.dtype | None,
        backward_weight: torch.Tensor | None = None,
    ) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.compute = compute
        self.backward_weight = backward_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        compute = self.compute or x.dtype
        own: torch.Tensor | None = self._parameters["bias"]
        bias = None if own is None else own.to(compute)
        with torch.autocast(x.device.type, enabled=False):
            if self.backward_weight is None:
                return linear(x.to(compute), self.weight.to(compute), bias).to(x.dtype)
            product: torch.Tensor = _Product.apply(
                x.to(compute), self.weight.to(compute), self.backward_weight.to(compute)
            )
            return (product if bias is None else product + bias).to(x.dtype)


Weights = Mapping[str, torch.Tensor]


def float64(base: Any, weights: Weights) -> nn.Module:
    """Turn a fresh base into its float64 twin, in place; ``weights`` are the quantized layers', by name."""
    _replace(base, lambda name, module: TwinLinear(weights[name], _double(module.bias), torch.float64))
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")  # the grouped product knows no float64
    twin: nn.Module = base.double()
    return twin


def same_dtype(base: nn.Module, weights: Weights, profile: str) -> nn.Module:
    """Turn a fresh base into the twin that rounds as an ideal preparation under ``profile`` must, in place."""

    def plain(name: str, module: Any) -> TwinLinear:
        compute, unpacked = backends.compute_dtype(module), backends.state_dtype(module)
        weight = weights[name]
        bias = module.bias
        if compute is None or unpacked is None:
            # int8 has no dtype of its own: its kernel's arithmetic is float32, rounded as the kernel rounds.
            return TwinLinear(backends.dequantized(module), None if bias is None else bias.detach().clone(), None)
        return TwinLinear(
            weight.to(compute),
            None if bias is None else bias.detach().to(compute),
            compute,
            backward_weight=None if unpacked == compute else weight.to(unpacked),
        )

    norms = {id(m) for n, m in base.named_modules() if norm_evidence(n, m)}
    _replace(base, plain)
    for module in base.modules():
        if isinstance(module, TwinLinear) or profile == "frozen-half":
            continue
        if profile == "peft" or id(module) in norms:
            for parameter in module.parameters(recurse=False):
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
    return base


def _replace(model: nn.Module, build: Any) -> None:
    for name, module in list(model.named_modules()):
        if backends.is_quantized(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, build(name, module))


def _double(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().double()


@dataclass(frozen=True, slots=True)
class Twins:
    """What the twins of one base gave: gradients and their yardsticks, and losses while training.

    ``exact`` are the float64 twin's gradients and ``rounded`` those of the twin in the preparation's own dtypes;
    ``yardsticks`` is how far the second is from the first, relative, by adapter, never below one ulp.
    """

    exact: step.Gradients
    rounded: step.Gradients
    yardsticks: Mapping[str, float]
    losses: tuple[float, ...]
    learning_rate: float

    @property
    def median_yardstick(self) -> float:
        """The median over adapters with a gradient."""
        return median(self.yardsticks.values()) if self.yardsticks else 0.0


def logits_of(output: Any) -> torch.Tensor:
    """The model's logits, as (…, classes)."""
    logits = output.logits
    if not isinstance(logits, torch.Tensor):
        raise TypeError("the model's output has no logits tensor")
    return logits.detach()


def forward_logits(
    model: nn.Module, batch: step.Batch, autocast: AbstractContextManager[Any] | None = None
) -> torch.Tensor:
    """Logits of one forward without gradients, in train mode with every dropout at 0.

    Train mode, because in eval mode bitsandbytes repacks 4-bit weights for some processors.
    """
    flags = [(m, m.training) for m in model.modules()]
    model.train()
    try:
        with torch.no_grad(), step.checkpointing_off(model), step.dropout_raised(model, 0.0):
            if autocast is None:
                return logits_of(model(**step.feed(model, batch)))
            with autocast:
                return logits_of(model(**step.feed(model, batch)))
    finally:
        for module, training in flags:
            module.training = training


def root_mean_square_error(found: torch.Tensor, exact: torch.Tensor, keep: torch.Tensor | None = None) -> float:
    """Root mean square of the difference over that of the exact values, over the tokens kept."""
    wide = found.double()
    if keep is not None:
        wide, exact = wide[keep], exact[keep]
    scale = float(exact.square().mean().sqrt())
    return float((wide - exact).square().mean().sqrt()) / scale if scale else 0.0


def smooth_training(
    model: nn.Module, batch: step.Batch, adapters: Mapping[str, nn.Parameter], *, seed: int
) -> tuple[float, tuple[float, ...]]:
    """The largest learning rate at which the twin's loss falls in every step, with those losses.

    At a larger one the path is chaotic: a rounding decides where it ends, and comparing ends says nothing.
    """
    start = {n: p.detach().clone() for n, p in adapters.items()}
    for rate in LEARNING_RATES:
        losses = train(model, batch, adapters, learning_rate=rate, seed=seed)
        if all(b < a for a, b in pairwise(losses)):
            break
        for name, parameter in adapters.items():
            parameter.data.copy_(start[name])
    return rate, losses


def train(
    model: nn.Module,
    batch: step.Batch,
    adapters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    autocast: Any = None,
    seed: int = 0,
) -> tuple[float, ...]:
    """Losses before each of a few AdamW steps on one batch, and after the last. Weight decay is on."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=WEIGHT_DECAY, eps=EPSILON
    )
    losses = []
    model.train()
    device = str(next(iter(batch.values())).device)
    with step.seeded(seed, device):
        for _ in range(STEPS):
            with autocast() if autocast else nullcontext():
                loss = model(**step.feed(model, batch)).loss
            losses.append(float(loss.detach()))
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad(), autocast() if autocast else nullcontext():
            losses.append(float(model(**step.feed(model, batch)).loss.detach()))
    step.clear_gradients(model)
    return tuple(losses)
