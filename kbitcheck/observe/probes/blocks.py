"""What each block of a model did in one training step."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from kbitcheck.core.facts import BlockFacts
from kbitcheck.models.blocks import is_block, tower
from kbitcheck.observe import internals
from kbitcheck.observe.probes.live import tensors

HANDED_IN = (
    "_kbitcheck_handed_in"  # attribute of a tensor that a hook hands to a block in the place of another: that one
)


class Watch(ExitStack):
    """Hooks on every block and the modules inside it, until closed. ``phase`` is ``forward`` or ``backward``.

    ``guard`` makes each hook of a function.

    Runs are counted on one module inside a block: transformers 5 checkpoints ``forward``, so that hooks on the block
    itself fire once; 4.56 checkpoints ``__call__``; and a non-reentrant recompute stops early and skips post hooks.
    """

    def __init__(self, model: nn.Module, guard: Callable[[Callable[..., object]], Any] = lambda hook: hook) -> None:
        super().__init__()
        self._guard = guard
        self.phase = "forward"
        self.order: list[str] = []
        self.blocks = {name: module for name, module in model.named_modules() if is_block(module)}
        self._readers: dict[int, set[str]] = {}
        self._unlike: set[str] = set()
        self._markers: dict[str, nn.Module] = {}  # of each block the module whose runs are counted
        self._computed: Counter[str] = Counter()
        self._with_grad: Counter[str] = Counter()
        self._without_grad: Counter[str] = Counter()
        self._asks: dict[str, bool] = {}
        self._on_path: set[str] = set()
        self._inputs: list[tuple[str, Any, int]] = []
        self._last: dict[str, int] = {}
        self._kept: list[torch.Tensor] = []
        self.callback(self._inputs.clear)
        self.callback(self._kept.clear)
        for name, module in self.blocks.items():
            enters, leaves, runs = (guard(partial(hook, name)) for hook in (self._entered, self._left, self._ran))
            self.enter_context(module.register_forward_pre_hook(enters, with_kwargs=True))
            self.enter_context(module.register_forward_hook(leaves))
            for inner in list(module.modules())[1:]:
                self.enter_context(inner.register_forward_pre_hook(runs))

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: a copy of the model, hooks among it, is not watched."""
        return self

    @property
    def reached(self) -> bool:
        """Whether a gradient came back through a block."""
        return bool(self._on_path)

    def follow(self, loss: torch.Tensor) -> None:
        """Record the blocks whose inputs something after the block reads too, as an output of hidden states does."""
        if not self._inputs:
            return
        readers: dict[tuple[Any, int], list[int]] = {}
        seen, todo = {loss.grad_fn}, [loss.grad_fn]
        while todo:
            node: Any = todo.pop()
            for source, number in node.next_functions if node is not None else ():
                readers.setdefault((source, number), []).append(internals.sequence_number(node))
                if source not in seen:
                    seen.add(source)
                    todo.append(source)
        for name, source, number in self._inputs:
            # Nodes are numbered as they are made: what a block makes comes before the end of its output.
            inside = [nr <= self._last.get(name, -1) for nr in readers.get((source, number), ())]
            if any(inside) and not all(inside):
                self._unlike.add(name)

    def _entered(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.phase != "forward":
            return
        (self._with_grad if torch.is_grad_enabled() else self._without_grad)[name] += 1
        floating = [t for t in tensors(args, kwargs) if t.is_floating_point()]
        if floating:  # a block may run several times in a step, some of them without gradients
            self._asks[name] = self._asks.get(name, False) or floating[0].requires_grad
        for tensor in (getattr(t, HANDED_IN, t) for t in floating):
            if tensor.requires_grad:
                if tensor.grad_fn is not None:
                    self._inputs.append((name, tensor.grad_fn, tensor.output_nr))
                self._kept.append(tensor)
                self._readers.setdefault(id(tensor), set()).add(name)
                if not tensor.is_contiguous():
                    self._unlike.add(name)

    def _left(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in tensors(output):
            if tensor.grad_fn is not None and self.phase == "forward":
                self._last[name] = max(self._last.get(name, -1), internals.sequence_number(tensor.grad_fn))
            if tensor.requires_grad:
                tensor.register_hook(self._guard(lambda gradient: self._on_path.add(name)))

    def _ran(self, name: str, module: nn.Module, args: Any) -> None:
        if self._markers.setdefault(name, module) is module:
            if self.phase == "forward":
                self._computed[name] += 1
            else:
                self.order.append(name)

    def facts(self) -> dict[str, BlockFacts]:
        """What each block did."""
        return {
            name: BlockFacts(
                name=name,
                tower=tower(name),
                computed=self._computed[name],
                recomputed=self.order.count(name),
                without_grad=self._without_grad[name],
                on_path=name in self._on_path,
                input_requires_grad=self._asks.get(name),
            )
            for name in self.blocks
        }

    @property
    def inexact(self) -> tuple[str, ...]:
        """Blocks whose gradients may differ in the last bits when checkpointed or accumulated.

        If an input is read elsewhere too, or a block runs several times, gradients are added in another order. A checkpoint
        makes the input a leaf: if its rows are not contiguous, so is its gradient, and kernels add in another order.
        """
        shared = {name for names in self._readers.values() if len(names) > 1 for name in names}
        repeated = {name for name, times in self._with_grad.items() if times > 1}
        return tuple(sorted(shared | repeated | self._unlike))
