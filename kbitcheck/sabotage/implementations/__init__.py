"""Broken implementations that owe the reference nothing, written out as people write them: freeze, cast, switch on."""

from kbitcheck.sabotage.implementations import checkpointing, contract, freezing, gradients, precision

__all__ = ["checkpointing", "contract", "freezing", "gradients", "precision"]
