"""Faults, each registered under the rule that must catch it, and the self-test that runs them all.

A fault breaks a prepared model (``breaks``), wraps an implementation (``wraps``), or is a property of the model itself
(``spoils``, for the rules that tell facts about models).
"""

from kbitcheck.sabotage import (
    audit,
    checkpointing,
    contract,
    cost,
    freezing,
    gradients,
    hidden,
    implementations,
    precision,
)
from kbitcheck.sabotage.fault import Fault, faults
from kbitcheck.sabotage.selftest import Verdict, run

__all__ = [
    "Fault",
    "Verdict",
    "audit",
    "checkpointing",
    "contract",
    "cost",
    "faults",
    "freezing",
    "gradients",
    "hidden",
    "implementations",
    "precision",
    "run",
]
