"""Faults, each registered under the rule that must catch it, and the self-test that runs them all.

A fault of a *model* breaks a prepared one (``breaks``) or is there before (``spoils``); one of an *implementation* wraps a
good one (``wraps``) or is one of its own (``implements``, ``adds``). Every rule has both, or a reason in ``WITHOUT``. Some
faults hide: they show in one quantization, tower, shape, mode or step alone, or in no output at all.
"""

from kbitcheck.sabotage import audit, checkpointing, contract, cost, freezing, gradients, precision, recipe
from kbitcheck.sabotage.fault import WITHOUT, Fault, faults

__all__ = [
    "WITHOUT",
    "Fault",
    "audit",
    "checkpointing",
    "contract",
    "cost",
    "faults",
    "freezing",
    "gradients",
    "precision",
    "recipe",
]
