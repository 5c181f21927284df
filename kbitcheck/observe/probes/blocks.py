"""What each block of a model did in one training step."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from kbitcheck.core.facts import BlockFacts
from kbitcheck.observe import internals
from kbitcheck.observe.probes.live import tensors
from kbitcheck.observe.probes.snapshot import is_block, tower


@dataclass(slots=True)
class _Block:
    """What one block did in one step."""

    computed: int = 0
    recomputed: int = 0
    marker: int | None = None  # of the module inside whose runs are counted
    input_requires_grad: bool | None = None
    without_grad: int = 0
    on_path: bool = False


class Watch:
    """Hooks on every block and the modules inside it, for one step. ``phase`` is ``forward`` or ``backward``.

    Runs are counted on one module inside a block: transformers 5 checkpoints ``forward``, so that hooks on the block
    itself fire once; 4.56 checkpoints ``__call__``; and a non-reentrant recompute stops early and skips post hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.phase = "forward"
        self.order: list[str] = []
        self.blocks = {name: _Block() for name, module in model.named_modules() if is_block(module)}
        self.readers: dict[int, set[str]] = {}
        self.turned: set[str] = set()
        self.entered: Counter[str] = Counter()
        self.branching: set[str] = set()
        self._inputs: list[tuple[str, Any, int]] = []
        self._last: dict[str, int] = {}
        self._kept: list[torch.Tensor] = []
        self._hooks = ExitStack()
        for name in self.blocks:
            module = model.get_submodule(name)
            self._hooks.enter_context(module.register_forward_pre_hook(partial(self._entered, name), with_kwargs=True))
            self._hooks.enter_context(module.register_forward_hook(partial(self._left, name)))
            for inner in list(module.modules())[1:]:
                self._hooks.enter_context(inner.register_forward_pre_hook(partial(self._ran, name)))

    def remove(self) -> None:
        """Take every hook off again."""
        self._hooks.close()
        self._kept.clear()
        self._inputs.clear()

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
                self.branching.add(name)

    def _entered(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.phase != "forward":
            return
        block = self.blocks[name]
        floating = [t for t in tensors(args, kwargs) if t.is_floating_point()]
        block.without_grad += not torch.is_grad_enabled()
        self.entered[name] += torch.is_grad_enabled()
        if floating:  # a block may run several times in a step, some of them without gradients
            block.input_requires_grad = bool(block.input_requires_grad) or floating[0].requires_grad
        for tensor in floating:
            if tensor.requires_grad:
                if tensor.grad_fn is not None:
                    self._inputs.append((name, tensor.grad_fn, tensor.output_nr))
                self._kept.append(tensor)
                self.readers.setdefault(id(tensor), set()).add(name)
                if not tensor.is_contiguous():
                    self.turned.add(name)

    def _left(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        def reached(gradient: torch.Tensor) -> None:
            self.blocks[name].on_path = True

        for tensor in tensors(output):
            if tensor.grad_fn is not None and self.phase == "forward":
                self._last[name] = max(self._last.get(name, -1), internals.sequence_number(tensor.grad_fn))
            if tensor.requires_grad:
                tensor.register_hook(reached)

    def _ran(self, name: str, module: nn.Module, args: Any) -> None:
        block = self.blocks[name]
        if block.marker is None:
            block.marker = id(module)
        if id(module) != block.marker:
            return
        if self.phase == "forward":
            block.computed += 1
        else:
            block.recomputed += 1
            self.order.append(name)

    def facts(self) -> dict[str, BlockFacts]:
        """What each block did."""
        return {
            name: BlockFacts(
                name=name,
                tower=tower(name),
                computed=block.computed,
                recomputed=block.recomputed,
                without_grad=block.without_grad,
                on_path=block.on_path,
                input_requires_grad=block.input_requires_grad,
            )
            for name, block in self.blocks.items()
        }

    @property
    def inexact(self) -> tuple[str, ...]:
        """Blocks whose gradients may differ in the last bits when checkpointed or accumulated.

        If an input is read elsewhere too, or a block runs several times, gradients are added in another order. A checkpoint
        makes the input a leaf: if its rows are not contiguous, so is its gradient, and kernels add in another order.
        """
        shared = {name for names in self.readers.values() if len(names) > 1 for name in names}
        repeated = {name for name, times in self.entered.items() if times > 1}
        return tuple(sorted(shared | repeated | self.branching | self.turned))
