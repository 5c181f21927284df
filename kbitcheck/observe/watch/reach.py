"""Which experts, blocks and layers outside blocks a batch reaches; the others have nothing to learn from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from kbitcheck_reference.adapters import adapter_parameters
from torch import nn

from kbitcheck.core.anatomy import expert_of
from kbitcheck.models.blocks import tower
from kbitcheck.observe.blockwise.record import floating, outermost_blocks
from kbitcheck.observe.probes.live import tensors
from kbitcheck.observe.probes.snapshot import heads
from kbitcheck.observe.watch.guard import Guard


class Reach:
    """Modules that ran in training forwards. An expert's run counts unless its input, or every gradient of its output, is zero.

    Some models hand every expert all tokens, multiplied by what the router gives them.
    """

    def __init__(self, model: nn.Module, guard: Guard) -> None:
        self._guard = guard
        self.forward = False  # a training forward of the model runs
        names = {expert_of(name) for name, _ in model.named_modules()} - {""}
        self._experts = {name: model.get_submodule(name) for name in names}
        self._blocks = {name: model.get_submodule(name) for name in outermost_blocks(model)}
        self._others = dict(_holders(model, tuple(self._blocks)))
        self._ran: set[str] = set()
        self._masked: set[str] = set()  # experts whose output got gradients, all of them zero
        self._handles: dict[str, list[Any]] = {}

    @property
    def idle(self) -> frozenset[str]:
        """Experts that no token reached; blocks of towers none of whose blocks ran, where others did; what belongs to no block beside these."""
        experts = {name for name in self._experts if name not in self._ran or name in self._masked}
        running = {tower(name) for name in self._blocks if name in self._ran}
        blocks = {name for name in self._blocks if running and tower(name) not in running}
        others = {name for name in self._others if blocks and name not in self._ran}
        return frozenset(experts | blocks | others)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hooks on each of them, which the first run takes off again."""
        with ExitStack() as hooks:
            hooks.callback(self._remove)
            for name, module in {**self._blocks, **self._others, **self._experts}.items():
                runs = self._guard(partial(self._runs, name))
                self._handles[name] = [module.register_forward_pre_hook(runs, with_kwargs=True)]
                if name in self._experts:
                    returns = self._guard(partial(self._returns, name))
                    self._handles[name].append(module.register_forward_hook(returns))
            yield

    def _runs(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not (self.forward or torch.is_grad_enabled()):
            # In train mode, as where a script runs an encoder by itself: what its output teaches does not come back.
            self._ran |= {name} if module.training and name not in self._experts else set()
            return
        if name not in self._experts:
            self._ran.add(name)
            self._off(name)
        elif any(bool(tensor.any()) for tensor in tensors(args, kwargs) if floating(tensor)):
            self._ran.add(name)

    def _returns(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._guard(partial(self._weighs, name)))

    def _weighs(self, name: str, gradient: torch.Tensor | None) -> None:
        if name not in self._handles:
            return
        if gradient is None or not bool(gradient.any()):
            self._masked.add(name)
        else:
            self._masked.discard(name)
            self._off(name)

    def _off(self, name: str) -> None:
        for handle in self._handles.pop(name, ()):
            handle.remove()

    def _remove(self) -> None:
        for name in list(self._handles):
            self._off(name)


def _holders(model: nn.Module, blocks: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """The layers outside blocks that have adapters, less the head, which each loss reads."""
    owned, head = adapter_parameters(model), heads(model)
    for name, parameter in model.named_parameters():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        path = name.rpartition(".")[0]
        while id(parameter) in owned and path and not inside:
            module = model.get_submodule(path)
            if any(id(p) not in owned for p in module.parameters()):
                if not any(module is each or module in each.modules() for each in head):
                    yield path, module
                break
            path = path.rpartition(".")[0]
