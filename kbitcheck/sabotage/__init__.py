"""Faults, each registered under the rule that must catch it; ``kbitcheck selftest`` tries them all.

A fault of a *model* damages a prepared model (``breaks``) or the loaded one (``spoils``); a fault of an *implementation*
calls a good one (``wraps``) or is one of its own (``implements``, ``adds``); a fault of a *run* is a training script
(``trains``), or one process of several (``composes``); a fault of what was *saved* damages an adapter's files
(``saves``). Every rule has all of them, or a reason in ``WITHOUT``. Some faults hide: they show in one quantization, tower,
shape, mode or step alone, or in no output at all.
"""

from kbitcheck.sabotage import (
    adapter,
    attached,
    audit,
    checkpointing,
    composition,
    contract,
    cost,
    drawn,
    experts,
    freezing,
    gradients,
    layouts,
    moves,
    precision,
    small_gradients,
    start,
    use,
    use_beside,
    use_called,
    use_circumstances,
    watched,
)
from kbitcheck.sabotage.fault import WITHOUT, Fault, faults

__all__ = [
    "WITHOUT", "Fault", "adapter", "attached", "audit", "checkpointing", "composition", "contract", "cost", "drawn", "experts", "faults",
    "freezing", "gradients", "layouts", "moves", "precision", "small_gradients", "start", "use", "use_beside", "use_called",
    "use_circumstances", "watched",
]  # fmt: skip
