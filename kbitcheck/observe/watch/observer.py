"""Follows the first optimizer steps of a user's own training, and leaves every bit of them as it is."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any, Self, TypeVar, cast

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kbitcheck import backends
from kbitcheck.core.errors import cause
from kbitcheck.core.facts import (
    BlockwiseFacts,
    Gap,
    ModelFacts,
    Part,
    RunFacts,
    SwitchedOn,
    Update,
    WatchedRun,
    WatchedStep,
)
from kbitcheck.core.training import Training
from kbitcheck.observe import internals
from kbitcheck.observe.blockwise.record import outermost_blocks
from kbitcheck.observe.in_place import random_states_restored
from kbitcheck.observe.meant_to_train import declared, owned
from kbitcheck.observe.probes import digest
from kbitcheck.observe.probes.snapshot import snapshot
from kbitcheck.observe.watch import LENT, updates
from kbitcheck.observe.watch.batches import Batches
from kbitcheck.observe.watch.blocks import Recorder, compared

F = TypeVar("F", bound=Callable[..., Any])


def _unharmed(method: F) -> F:
    """A callback that cannot harm the run: what it raises takes the observer off, and random states are put back."""

    @functools.wraps(method)
    def guarded(self: Observer, *args: Any, **kwargs: Any) -> None:
        if self.over or self._busy or (LENT in vars(self.model) and not self._by_check):
            return
        self._busy = True
        try:
            with random_states_restored(), torch.compiler.set_stance("force_eager"):
                method(self, *args, **kwargs)
        except Exception as error:
            self.failed = cause(error)
            self.stop()
        finally:
            self._busy = False

    return cast(F, torch.compiler.disable(guarded))  # hooks of a compiled model are part of what is compiled


class Observer:
    """Hooks on a quantized model and on the steps of the caller's optimizer, or of any, until enough of them were taken.

    ``by_check``: the steps are those of a check on a model that it was lent, and no block is compared with a twin.
    ``when_over`` is called once, after everything is off.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        *,
        seed: int = 0,
        enabled: Sequence[SwitchedOn] = (),
        by_check: bool = False,
        when_over: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.failed = ""
        self.over = False
        self.before: ModelFacts | None = None
        self.after: ModelFacts | None = None
        self.biases: dict[str, str] = {}
        self.parts: dict[str, Part] = {}
        self.gaps: dict[str, Gap] = {}
        self._when_over = when_over
        self._training = training
        self._optimizer = inner_optimizer(training.optimizer)
        self._base_grads: tuple[str, ...] = ()
        self._random = random.Random(seed)  # noqa: S311  (which block is looked at)
        self._steps: list[WatchedStep] = []
        self._held: dict[int, str] = {}
        self._foreign = 0
        self._unseen = ""
        self._busy = False
        self._by_check = by_check
        self._recorders: list[Recorder] = []
        self._names: dict[int, str] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._wide: dict[int, torch.Tensor] = {}
        self._hooks = ExitStack()
        self.batches = Batches(model, enabled)

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: a copy of the model, hooks among it, is not looked at."""
        return self

    def start(self) -> None:
        """Put the hooks on. A sharded model gets none: every other process would have to wait for what is read of it."""
        if internals.is_sharded(self.model):
            self.failed = "a model that FSDP shards is not watched"
            self.stop()
            return
        take_off = self._hooks.callback
        take_off(self._remove_recorders)
        self._hooks.enter_context(self.batches.watched())
        take_off(self.model.register_forward_pre_hook(self._forward, with_kwargs=True, prepend=True).remove)
        take_off(self.model.register_forward_hook(self._output, with_kwargs=True).remove)
        take_off(register_optimizer_step_pre_hook(self._before_step).remove)
        take_off(register_optimizer_step_post_hook(self._after_step).remove)

    def stop(self) -> None:
        """Take everything off."""
        if self.over:
            return
        self.over = True
        self._hooks.close()
        self._values, self._wide = {}, {}
        if self._steps and not self.failed:
            with random_states_restored():
                self.after = snapshot(self.model, self.meant)
        self._when_over()

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward of the model has begun, whose hooks were called before this observer's were put on."""
        self._forward(module, args, kwargs)

    @property
    def run(self) -> WatchedRun:
        """What was seen of the optimizer's steps."""
        held = frozenset(self._held.values())
        return WatchedRun(
            steps=tuple(self._steps),
            adapters=frozenset(owned(self.model, declared(self.model, self._training))),
            held=held,
            foreign=self._foreign,
            copied=tuple(sorted(n for n in held if n.replace(".original_module.", ".modules_to_save.") != n)),
            switched_on=tuple(self.batches.switched_on),
            cached=self.batches.cached,
            entering=self.batches.entering,
            attention=internals.attention(getattr(self.model, "config", None)) or "",
            unseen="" if self.parts else self._unseen,
        )

    @property
    def step(self) -> RunFacts | None:
        """The first watched forward and backward; None where none ran."""
        first = self.batches.first
        return first and dataclasses.replace(first, base_grads=self._base_grads)

    @property
    def blockwise(self) -> BlockwiseFacts:
        """The blocks that were looked at, beside their twins."""
        return BlockwiseFacts(parts=self.parts, adapters=self.gaps)

    @property
    def meant(self) -> dict[str, nn.Parameter]:
        """The parameters that are meant to train: adapters, what an optimizer holds, and what ``trains`` names."""
        copied = self.run.copied
        held = {
            name: p
            for name, p in self.model.named_parameters()
            if p.requires_grad and name not in copied and id(p) in self._held
        }
        return {**owned(self.model, declared(self.model, self._training)), **held}

    @_unharmed
    def _forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not self.model or not (torch.is_grad_enabled() and module.training) or internals.backward_runs():
            return
        if self.before is None:
            self._names = {id(p): n for n, p in self.model.named_parameters()}
            self.before = snapshot(self.model, self.meant)
            for name, layer in backends.quantized_layers(self.model):
                if getattr(layer, "bias", None) is not None:
                    self.biases[f"{name}.bias"] = digest.bits(backends.arithmetic(layer).bias_after_forward(layer))
        if not self._by_check and not self._recorders:
            self._draw()
        for recorder in self._recorders:
            recorder.next_batch()
        self.batches.begin(args, kwargs)

    @_unharmed
    def _output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        training = module is self.model and module.training and torch.is_grad_enabled()
        if training and self.batches.any and not internals.backward_runs():
            self.batches.end(output)

    def _draw(self) -> None:
        """Look at one block of every class, drawn anew."""
        kinds: dict[str, list[str]] = {}
        for name in outermost_blocks(self.model):
            kinds.setdefault(type(self.model.get_submodule(name)).__name__, []).append(name)
        if not kinds:
            self._unseen = "the model has no blocks"
        for names in kinds.values():
            name = self._random.choice(names)
            self._recorders.append(Recorder(name, self.model.get_submodule(name)))

    @_unharmed
    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        mine = [p for p in held if id(p) in self._names]
        if not self._is_its_step(optimizer, mine):
            return
        self._held.update((id(p), self._names[id(p)]) for p in mine)
        if self.before is not None and not self._steps:
            self.before = self._as_meant(self.before)
            grads = [n for n, p in self.model.named_parameters() if p.grad is not None]
            self._base_grads = tuple(n for n in grads if not self.before.parameters[n].adapter)
        self._foreign = max(self._foreign, len(held) - len(mine))
        self.batches.finish()
        self._compare()
        self._values = {self._names[id(p)]: p.detach().clone() for p in mine}
        try:
            self._wide = updates.in_float32(optimizer, mine)
        except (
            Exception
        ):  # an optimizer of a kind that cannot be stepped beside itself: nothing is said of its rounding
            self._wide = {}

    def _is_its_step(self, optimizer: Any, mine: Collection[Any]) -> bool:
        """Whether a step is the model's, or may be: a forward ran, and no other optimizer holds its parameters."""
        if self._optimizer is not None and optimizer is not self._optimizer:
            return False
        return self.batches.any and (bool(mine) or not self._held)

    def _as_meant(self, facts: ModelFacts) -> ModelFacts:
        """The snapshot with what is meant to train, now that the optimizer is there."""
        meant = self.meant
        return dataclasses.replace(
            facts,
            parameters={n: dataclasses.replace(p, adapter=n in meant) for n, p in facts.parameters.items()},
        )

    @_unharmed
    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        own = {id(p): p for group in optimizer.param_groups for p in group["params"] if id(p) in self._names}
        if not self._is_its_step(optimizer, own):
            return
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        rate = max(rates.values(), default=0.0)
        peak = max((float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups), default=0.0)
        by_name: dict[str, Update] = {}
        for key, parameter in own.items():
            name = self._names[key]
            before, wide = self._values[name], self._wide.get(key)
            by_name[name] = updates.update(before, parameter.detach(), wide, rate=rates[key], gradient=parameter.grad)
        batches = tuple(self.batches.taken())
        self._steps.append(WatchedStep(rate=rate, peak=peak, batches=batches, updates=by_name))
        self._values, self._wide = {}, {}
        self._remove_recorders()
        if len(self._steps) == self._training.steps:
            self.stop()

    def _compare(self) -> None:
        """The recorded blocks beside their twins."""
        number = len(self._steps) + 1
        for recorder in self._recorders:
            recorder.remove()
            seen = compared(recorder)
            if isinstance(seen, str):
                self._unseen = seen
                continue
            part, gaps = seen
            self.parts[f"{recorder.name} (step {number})"] = part
            self.gaps.update((f"{recorder.name}.{name} (step {number})", gap) for name, gap in gaps.items())

    def _remove_recorders(self) -> None:
        for recorder in self._recorders:
            recorder.remove()
        self._recorders = []


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside what accelerate wraps round it."""
    return getattr(optimizer, "optimizer", optimizer)
