"""Bytes of tensors alive, counted as storages, on any device and whatever holds them.

Hooks on what autograd saves would miss attributes of nodes (the inputs of bitsandbytes' int8 functions), closures (the
keyword arguments of reentrant checkpointing), and what a non-reentrant recompute brings back.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.observe import internals
from kbitcheck.observe.probes.parts import parts

EXISTING = "existing"


class Live(internals.TorchDispatchMode):
    """Counts the storages that operators make while it is entered, each until it is freed. Bytes throughout.

    ``now`` and ``peak`` are totals; ``tag`` labels new storages. Those of ``existing`` tensors are tagged ``EXISTING``.
    """

    def __init__(self, existing: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.tag = EXISTING
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        for tensor in existing:
            for part in parts(tensor):
                self.add(part)
        self.tag = ""

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now on, once."""
        storage = tensor.untyped_storage()
        key = internals.storage_id(tensor)
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = (weakref.ref(storage, partial(self._freed, key)), size, self.tag)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.made(key, size)

    def made(self, key: int, size: int) -> None:
        """A storage of that identity is counted from now on. For subclasses."""

    def freed(self, key: int) -> None:
        """The storage of that identity was freed. For subclasses."""

    def holds(self) -> dict[int, tuple[int, str]]:
        """Size and tag of each storage alive, by its identity."""
        return {key: (size, tag) for key, (_, size, tag) in self._alive.items()}

    def tag_of(self, tensor: torch.Tensor) -> str | None:
        """The tag of a tensor's storage; None where that is not counted."""
        _, _, tag = self._alive.get(internals.storage_id(tensor), (None, 0, None))
        return tag

    def _freed(self, key: int, _: Any) -> None:
        if key in self._alive:
            self.now -= self._alive.pop(key)[1]
            self.freed(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.call(func, args, kwargs or {})
        for tensor in tensors(out):
            for part in parts(tensor):
                if internals.storage_id(part) not in self._alive and not _is_in(part, args, kwargs):
                    self.add(part)
        return out

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator returns. For subclasses."""
        return func(*args, **kwargs)


def _is_in(tensor: torch.Tensor, *items: Any) -> bool:
    """Whether a tensor is a view of one inside nested containers: what a module keeps in a plain attribute was there before."""
    storage = internals.storage_id(tensor)
    return any(internals.storage_id(part) == storage for each in tensors(*items) for part in parts(each))


def state_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a quantized layer's state by name, no parameters or buffers; layers may share some."""
    state = backends.recognition(layer).state(layer)
    return {name: field for name, field in state.items() if isinstance(field, torch.Tensor)}


def own_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter, buffer and tensor of a quantization state; of one that wraps others, those."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield from parts(tensor)
    for _, layer in backends.holders(model):
        yield from state_tensors(layer).values()


def tensors(*items: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside nested containers, model outputs and caches that are mappings included."""
    for item in items:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, Mapping):
            yield from tensors(*item.values())
        elif isinstance(item, (tuple, list)):
            yield from tensors(*item)


def hidden_states(args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The tensor that a block called with these arguments passes on to the next one."""
    hidden = next(tensors(*args), None) if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))
    if hidden is None:
        raise NotImplementedError("a block that is called without hidden states")
    return hidden
