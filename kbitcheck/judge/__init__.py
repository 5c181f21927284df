"""The rules, one family a file: pure functions from facts to observations. Importing this registers them all."""

from kbitcheck.judge import (
    adapter,
    audit,
    batches,
    checkpointing,
    contract,
    cost,
    drawn,
    freezing,
    gradients,
    loop,
    optimizer,
    precision,
    quantizer,
    recipe,
    use,
    watched,
)

__all__ = [
    "adapter",
    "audit",
    "batches",
    "checkpointing",
    "contract",
    "cost",
    "drawn",
    "freezing",
    "gradients",
    "loop",
    "optimizer",
    "precision",
    "quantizer",
    "recipe",
    "use",
    "watched",
]
