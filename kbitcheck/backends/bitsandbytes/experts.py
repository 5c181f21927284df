"""Stacked experts in 4 bits: each parameter is unpacked whenever the model reads it (bitsandbytes' parametrization)."""

from collections.abc import Sequence
from typing import Any

from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import nn

from kbitcheck.backends.packed import skipped, stacked
from kbitcheck.backends.schemes import Choice
from kbitcheck.core.errors import UsageError


def parametrize(model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
    """Pack the three-dimensional parameters of each module of experts, but of those that ``skip`` names.

    Raises:
        UsageError: the model has no stacked experts.
    """
    left_out, experts = skipped(skip), list(stacked(model))
    if not experts:
        raise UsageError(f"experts=parametrize: {type(model).__name__} has no stacked experts")
    for name, module, parameters in experts:
        for parameter in () if left_out(name) else parameters:
            scheme: Any = choice.scheme
            replace_parameter_4bit(module, parameter, compress_statistics=bool(choice["double"]), quant_type=scheme)
