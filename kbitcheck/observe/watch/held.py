"""What is held of what a block computes inside, between the forward and the backward of a user's own step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from kbitcheck.observe import internals
from kbitcheck.observe.blockwise.record import outermost_blocks
from kbitcheck.observe.probes.live import tensors
from kbitcheck.observe.watch.guard import Guard


class Held(ExitStack):
    """Hooks on the modules inside each block, until closed. They keep weak references alone to what these return."""

    def __init__(self, model: nn.Module, guard: Guard) -> None:
        super().__init__()
        self.forward = True
        self._model = model
        self._made: dict[str, dict[int, tuple[StorageWeakRef, int]]] = {}
        self._passed: dict[str, set[int]] = {}  # storages that enter or leave a block
        for name in outermost_blocks(model):
            block = model.get_submodule(name)
            self._made[name], self._passed[name] = {}, set()
            self.enter_context(block.register_forward_hook(guard(partial(self._passes, name)), with_kwargs=True))
            for inner in list(block.modules())[1:]:
                self.enter_context(inner.register_forward_hook(guard(partial(self._returned, name))))

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: a copy of the model, hooks among it, is not looked at."""
        return self

    def _passes(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.forward:
            self._passed[name] |= {_storage(t).cdata for t in tensors((args, kwargs, output))}

    def _returned(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.forward:
            for tensor in tensors(output):
                storage = _storage(tensor)
                self._made[name][storage.cdata] = storage, internals.local(tensor).untyped_storage().nbytes()

    def facts(self) -> Mapping[str, tuple[int, int]]:
        """By block that ran, now that the forward is over: the bytes that are held, and those that its modules returned."""
        self.forward = False
        own = {_storage(t).cdata for t in (*self._model.parameters(), *self._model.buffers())}
        counted: dict[str, tuple[int, int]] = {}
        for name, made in self._made.items():
            inside = [each for key, each in made.items() if key not in self._passed[name] | own]
            if inside:
                counted[name] = sum(n for ref, n in inside if not ref.expired()), sum(n for _, n in inside)
        return counted


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(internals.local(tensor).untyped_storage())
