"""Of the blocks of a model that compute the same, one runs: the others are passed."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn

from kbitcheck.models.blocks import Signature, is_block, signature, tower
from kbitcheck.observe import internals

# Where blocks of transformers keep what they computed, outside of buffers: RecurrentGemma's.
STATES = ("recurrent_states", "conv1d_state")


class Passed(nn.Module):
    """Stands for a block that equals ``like``, which runs: returns its input, and reports both passes to its ``watch``."""

    def __init__(self, block: nn.Module, like: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(block=block, like=like)  # no children: neither is run, moved or counted from here
        self.gradient_checkpointing = False
        self.watch: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.watch is not None
        return self.watch.passed(self, self.__dict__["like"], args, kwargs)


def _keeps_state(block: nn.Module) -> bool:
    return any(name in vars(module) for module in block.modules() for name in STATES)


def _listed(parent: nn.Module, blocks: int) -> list[Sequence[int]]:
    """Lists of some of the blocks that their parent, or its configuration, has: it calls these otherwise (Qwen2.5-VL's without windows)."""
    held = (*vars(parent).values(), *vars(getattr(parent, "config", None) or object).values())
    lists = [value for value in held if isinstance(value, list | tuple) and value]
    return [value for value in lists if all(type(n) is int and 0 <= n < blocks for n in value)]


def thin(model: nn.Module) -> None:
    """Put ``Passed`` in the place of the blocks that equal one that runs, tower by tower.

    The first block runs, as the steady state may not be reached before it, the last, whose output may not be read, and
    one of each kind between; those that a list of the model's names by their places are of another kind. A block that keeps
    a state of its own beyond its step holds bytes that no other stands for: it runs.
    """
    towers: dict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if is_block(module):
            towers[tower(name)].append(name)
    for stack, names in towers.items():
        kinds: dict[Signature, nn.Module] = {}
        listed = _listed(model.get_submodule(stack.rpartition(".")[0]), len(names))
        for place, name in enumerate(names[1:-1], start=1):
            block = model.get_submodule(name)
            named = tuple(place in places for places in listed)
            like = kinds.setdefault((signature(block), named), block)
            if like is not block and not _keeps_state(block):
                parent, _, child = name.rpartition(".")
                both: type[Passed] = type(Passed.__name__, (Passed, type(block)), {})  # models collect outputs by class
                internals.replace_child(model.get_submodule(parent), child, both(block, like))
