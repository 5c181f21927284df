"""What was put over a model's own arithmetic, and is no part of its twin: replaced forwards, and hooks."""

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from kbitcheck.models.blocks import is_block
from kbitcheck.observe import internals
from kbitcheck.observe.probes.float64 import KeepFloat64

# Their hooks move, collect or cast, and compute nothing else.
LIBRARIES = ("accelerate", "peft", "transformers")


def remove(copied: nn.Module, original: nn.Module) -> nn.Module:
    """The copy of a model, computing as its classes do.

    Inside the blocks no forward is replaced and no hook is left. Outside, where a trainer may have its own loss, only what
    calls the original is taken off: a bound method or an argument of a partial is copied with a model, a closure is
    not (TRL's forward is one). What libraries put on to move or collect tensors stays.
    """
    own = {id(m) for m in original.modules()}
    inside: set[int] = set()
    for block in copied.modules():
        if id(block) not in inside and is_block(block):
            inside.update(map(id, block.modules()))
    for module in copied.modules():
        replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
        if replaced and (id(module) in inside or _closes_over(module.forward, own)):
            del module.forward
        for hooks in internals.hook_tables(module):
            for key, hook in list(hooks.items()):
                if _closes_over(hook, own) or (id(module) in inside and not _of_a_library(hook)):
                    del hooks[key]
    return copied


def keep_float64(twin: nn.Module) -> nn.Module:
    """The float64 twin, in whose forward nothing is cast to a narrower dtype, as heads and adapters of a caller may be.

    It is not checkpointed: a recompute would cast.
    """
    for module in twin.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            vars(module)["gradient_checkpointing"] = False
    forward = twin.forward

    @functools.wraps(forward)
    def in_float64(*args: Any, **kwargs: Any) -> Any:
        with KeepFloat64():
            return forward(*args, **kwargs)

    twin.forward = in_float64
    return twin


def _of_a_library(hook: Any) -> bool:
    function = hook.func if isinstance(hook, functools.partial) else hook
    return str(getattr(function, "__module__", "")).partition(".")[0] in LIBRARIES


def _closes_over(function: Any, own: set[int], depth: int = 4) -> bool:
    if isinstance(function, functools.partial):
        return _closes_over(function.func, own, depth)
    function = getattr(function, "__func__", function)
    cells: Sequence[Any] = getattr(function, "__closure__", None) or ()
    for cell in cells:
        try:
            held = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if id(held) in own or id(getattr(held, "__self__", None)) in own:
            return True
        if depth and callable(held) and _closes_over(held, own, depth - 1):
            return True
    return False
