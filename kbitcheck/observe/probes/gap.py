"""How far a tensor of the model under test is from its two twins."""

from __future__ import annotations

import math

import torch

from kbitcheck.core.facts import Gap
from kbitcheck.observe.probes.step import equal

Tensor = torch.Tensor | None
LIMIT = 1e30


def gap(value: Tensor, exact: Tensor, rounded: Tensor) -> Gap:
    """``value`` beside the float64 twin's tensor and the same-dtype twin's, all of one shape; a missing tensor is zero."""
    bitwise = equal(value, rounded)
    finite = value is not None and bool(torch.isfinite(value).all())
    value, exact, rounded = _wide(value), _wide(exact), _wide(rounded)
    size = 0.0 if exact is None else float(exact.norm())
    norm = None if value is None else float(value.norm())
    if exact is None or not size or not math.isfinite(size):  # nothing to measure by
        off = 0.0 if bitwise else math.inf
        noise = math.inf if size or (rounded is not None and rounded.any()) else 0.0
        return Gap(
            norm=norm, finite=finite, size=size, error=off if norm else 0.0, yardstick=noise,
            from_rounded=off, factor=0.0, factor_noise=0.0, bitwise=bitwise,
        )  # fmt: skip
    error, rounding = _minus(value, exact), _minus(rounded, exact)
    reference, apart = exact + rounding, error - rounding
    squares = float(reference.norm()) ** 2 or 1.0
    products = apart * reference
    return Gap(
        norm=norm,
        finite=finite,
        size=size,
        error=float(error.norm()) / size,
        yardstick=float(rounding.norm()) / size,
        from_rounded=float(apart.norm()) / size,
        factor=float(products.sum()) / squares,
        factor_noise=float(products.norm()) / squares,
        bitwise=bitwise,
    )


def _minus(value: Tensor, exact: torch.Tensor) -> torch.Tensor:
    return -exact if value is None else value - exact


def _wide(value: Tensor) -> Tensor:
    """In float64, complex numbers as pairs. Masks hold the least number of their dtype, or infinity: each becomes the same number."""
    if value is None:
        return None
    real = torch.view_as_real(value.detach().resolve_conj()) if value.is_complex() else value.detach()
    return real.double().clamp(-LIMIT, LIMIT)
