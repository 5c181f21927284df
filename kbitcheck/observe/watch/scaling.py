"""What a gradient scaler does in a watched run: which steps it skips, and which gradients it is handed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kbitcheck.core.facts import ScalerFacts
from kbitcheck.observe import internals
from kbitcheck.observe.probes import switches
from kbitcheck.observe.watch.guard import Guard

SHRUNK = 1 - 1e-3  # of a norm, which rounding does not move so far


class Listener(Protocol):
    """Is called when a scaler scales a loss, unscales an optimizer's gradients, or was asked for a step."""

    def scaled(self, scaler: Any) -> None: ...
    def unscales(self, optimizer: Any) -> None: ...
    def scaler_stepped(self, scaler: Any, optimizer: Any, *, taken: bool) -> None: ...


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell the listener what every gradient scaler that is switched on does, for a while."""
    cls: Any = torch.amp.GradScaler
    own = {name: getattr(cls, name) for name in ("scale", "unscale_", "step")}
    steps: list[Any] = []  # the optimizers that stepped since a scaler was asked to step

    @wraps(own["scale"])
    def scale(self: Any, outputs: Any) -> Any:
        scaled = own["scale"](self, outputs)
        if self.is_enabled():
            listener.scaled(self)
        return scaled

    @wraps(own["unscale_"])
    def unscale_(self: Any, optimizer: Any) -> Any:
        if self.is_enabled():
            listener.unscales(optimizer)
        return own["unscale_"](self, optimizer)

    @wraps(own["step"])
    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        steps.clear()
        answer = own["step"](self, optimizer, *args, **kwargs)
        if self.is_enabled():
            listener.scaler_stepped(self, optimizer, taken=bool(steps))
        return answer

    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: steps.append(optimizer))
    patches = ((cls, "scale", scale), (cls, "unscale_", unscale_), (cls, "step", step))
    try:
        with switches.attributes(*patches):
            yield
    finally:
        handle.remove()


class Scaling:
    """What was seen of gradient scalers. ``trained`` gives the parameters that train, by name, ``limit`` that of ``ScalerFacts``."""

    def __init__(
        self, trained: Callable[[], Mapping[str, nn.Parameter]], limit: Callable[[], float], guard: Guard
    ) -> None:
        self._trained, self._limit, self._guard = trained, limit, guard
        self._norms: dict[str, float] = {}  # of gradients, as the last backward left them
        self._handles: list[Any] = []
        self._skipped = 0
        self._scales: list[float] = []  # at each step
        self._clipped: dict[str, None] = {}
        self._float16: dict[str, None] = {}
        self._there = False

    @property
    def facts(self) -> ScalerFacts | None:
        """None where no scaler is used."""
        if not self._there:
            return None
        return ScalerFacts(
            steps=len(self._scales),
            skipped=self._skipped,
            scales=tuple(self._scales),
            limit=self._limit(),
            clipped=tuple(self._clipped),
            float16=tuple(self._float16),
        )

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def scaled(self) -> None:
        """A loss was scaled; its backward is still to come."""
        self._there = True
        if self._handles or internals.is_distributed():  # other processes change gradients behind the backward
            return
        for name, parameter in self._trained().items():
            keep = self._guard(partial(self._keep, name))
            self._handles.append(parameter.register_post_accumulate_grad_hook(keep))

    def _keep(self, name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._norms[name] = _norm(parameter.grad)

    def unscales(self, optimizer: Any) -> None:
        """The gradients of an optimizer are about to be unscaled."""
        if internals.is_distributed():
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in self._trained().items():
            if id(parameter) in held and parameter.grad is not None:
                if parameter.grad.dtype is torch.float16:
                    self._float16[name] = None
                if _norm(parameter.grad) < SHRUNK * self._norms.get(name, 0.0):
                    self._clipped[name] = None

    def stepped(self, scale: float, *, taken: bool) -> None:
        """A scaler was asked for a step."""
        self._scales.append(scale)
        self._skipped += not taken
        self._norms = {}


def _norm(gradient: torch.Tensor) -> float:
    return float(gradient.detach().float().norm())
