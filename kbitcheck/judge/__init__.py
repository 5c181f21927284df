"""The rules, one family a file: pure functions from facts to observations. Importing this registers them all."""

from kbitcheck.judge import (
    adapter,
    audit,
    checkpointing,
    contract,
    cost,
    drawn,
    freezing,
    gradients,
    loop,
    precision,
    recipe,
    use,
    watched,
)

__all__ = [
    "adapter",
    "audit",
    "checkpointing",
    "contract",
    "cost",
    "drawn",
    "freezing",
    "gradients",
    "loop",
    "precision",
    "recipe",
    "use",
    "watched",
]
