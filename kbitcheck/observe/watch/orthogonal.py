"""AdaLoRA's factors, on which the loss depends outside their blocks, too: it adds how far each is from orthogonal."""

from collections.abc import Iterator, Mapping
from statistics import median

import torch
from torch import nn

from kbitcheck.observe.probes import step
from kbitcheck.observe.twin.twins import Pair


def with_term(factors: Mapping[str, nn.Parameter], gradients: step.Gradients, twins: Pair) -> Pair:
    """What twins of a block give its factors, and what the loss's own term adds.

    The term's weight is one number for all of them: the median of what the twin that rounds alike leaves of each gradient, along its term.
    """
    wide = {name: _term(name, factor.double()) for name, factor in factors.items()}
    weight = median([*_weights(wide, gradients, twins.rounded)] or [0.0])
    whole = Pair(dict(twins.exact), dict(twins.rounded))
    for name, factor in factors.items():
        for twin, term in ((whole.exact, wide[name]), (whole.rounded, _term(name, factor))):
            own = twin[name]
            twin[name] = weight * term if own is None else own + weight * term.to(own.dtype)
    return whole


def _weights(terms: Mapping[str, torch.Tensor], gradients: step.Gradients, twin: step.Gradients) -> Iterator[float]:
    for name, term in terms.items():
        gradient, own = gradients.get(name), twin.get(name)
        if gradient is not None and bool(term.any()):
            left = gradient.double() - (0.0 if own is None else own.double())
            yield float((left * term).sum() / term.square().sum())


def _term(name: str, factor: torch.Tensor) -> torch.Tensor:
    """The gradient of how far a factor is from orthogonal."""
    with torch.enable_grad():
        own = factor.detach().requires_grad_(True)
        product = own @ own.T if "lora_A" in name else own.T @ own
        away = torch.norm(product - torch.eye(len(product), dtype=own.dtype, device=own.device), p="fro")
        (gradient,) = torch.autograd.grad(away, own)
    return gradient.nan_to_num()
