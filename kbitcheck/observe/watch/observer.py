"""Follows the first optimizer steps of a user's own training, and leaves every bit of them as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kbitcheck import backends
from kbitcheck.core.facts import BlockwiseFacts, ModelFacts, RunFacts, SwitchedOn, WatchedRun
from kbitcheck.core.training import Training
from kbitcheck.observe import internals
from kbitcheck.observe.in_place import random_states_restored
from kbitcheck.observe.meant_to_train import declared, owned
from kbitcheck.observe.probes.snapshot import biases_after_forward, snapshot, tensors_again
from kbitcheck.observe.watch.batches import Batches
from kbitcheck.observe.watch.built import Built
from kbitcheck.observe.watch.comparisons import Comparisons
from kbitcheck.observe.watch.guard import Guard, take_off, unharmed
from kbitcheck.observe.watch.heard import Heard
from kbitcheck.observe.watch.replicas import Place, Replicas, place_of
from kbitcheck.observe.watch.scaling import Scaling, listening
from kbitcheck.observe.watch.steps import Steps, optimizers_of
from kbitcheck.observe.watch.strength import scalings


class Observer:
    """Hooks on a quantized model and on the steps of the caller's optimizer, or of any, until enough of them were taken.

    ``wrap`` averages the gradients of several processes, ``place`` says of which (``replicas.place_of``).
    ``by_check``: the steps are those of a check on a model that it was lent, and no block is compared with a twin.
    ``when_over`` is called once, after everything is off; ``when_strange`` where another model's optimizer steps.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        *,
        seed: int = 0,
        enabled: Sequence[SwitchedOn] = (),
        heard: Heard | None = None,
        built: Built | None = None,
        by_check: bool = False,
        wrap: DistributedDataParallel | None = None,
        place: Callable[[Any], Place | None] = place_of,
        when_over: Callable[[], None] = lambda: None,
        when_strange: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.failed, self.over, self.busy = "", False, False
        self.before: ModelFacts | None = None
        self.after: ModelFacts | None = None
        self.biases: dict[str, Mapping[str, str]] = {}
        self._when_over = when_over
        self._training = training
        self._base_grads: tuple[str, ...] = ()
        self._train: set[str] = set()
        self._adapters: set[str] = set()  # names of adapters that took part in a watched forward
        self.by_check, self._sharded = by_check, False
        self._hooks = ExitStack()
        self.steps = Steps(model, optimizers_of(training.optimizer), when_strange, built)
        self._heard = heard or Heard()
        self._guard = Guard(self)
        self.batches = Batches(model, enabled, self._guard)
        self.comparisons = Comparisons(model, self._guard, seed)
        self._replicas = Replicas(self._trained, wrap, place)
        self._scaling = Scaling(self._trained, lambda: self.batches.limit, self._guard)

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: a copy of the model, hooks among it, is not looked at."""
        return self

    def start(self) -> None:
        """Put the hooks on. No block of a sharded model is compared: its weights are whole for a moment alone, in all processes."""
        self._sharded = internals.is_sharded(self.model)
        self.comparisons.unseen = "FSDP shards the model, and no process has a whole block" * self._sharded
        self.steps.name_parameters()
        called = self._hooks.callback
        called(self.comparisons.remove)
        called(self._scaling.remove)
        self._hooks.enter_context(listening(self))
        self._hooks.enter_context(self._heard)
        self._hooks.enter_context(self.batches.watched())
        called(self.model.register_forward_pre_hook(self._forward, with_kwargs=True, prepend=True).remove)
        called(self.model.register_forward_hook(self._output, with_kwargs=True).remove)
        called(self._take_off, register_optimizer_step_pre_hook(self._before_step))
        called(self._take_off, register_optimizer_step_post_hook(self._after_step))

    def fail(self, why: str) -> None:
        """Nothing can be said of this run: take everything off, and let it go on."""
        self.failed = self.failed or why
        self.stop()

    def stop(self) -> None:
        """Take everything off."""
        if self.over:
            return
        self.over = True
        self.steps.close(self.batches.taken())
        self._hooks.close()
        self.steps.stop()
        self.comparisons.stop()
        if self.steps.taken and not self.failed:
            with random_states_restored():
                assert self.before is not None
                names = self.before.adapters
                meant = {n: p for n, p in self.model.named_parameters() if n in names}
                self.after = tensors_again(self.before, self.model, meant)
                later = {n for n, p in self.after.parameters.items() if p.requires_grad}
                self.before = _thawed(self.before, later)
        self._when_over()

    def _take_off(self, handle: Any) -> None:
        take_off(handle, running=self.busy)

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward of the model has begun, whose hooks were called before this observer's were put on."""
        self._forward(module, args, kwargs)

    @property
    def run(self) -> WatchedRun:
        """What was seen of the optimizer's steps."""
        held = frozenset(self.steps.held.values())
        return WatchedRun(
            steps=tuple(self.steps.taken),
            adapters=frozenset(owned(self.model, declared(self.model, self._training))) | self._adapters,
            held=held,
            foreign=self.steps.foreign,
            copied=self._copied,
            switched_on=tuple(self.batches.switched_on),
            cached=self.batches.cached,
            entering=self.batches.entering,
            attention=internals.attention(getattr(self.model, "config", None)) or "",
            unseen="" if self.comparisons.parts else self.comparisons.unseen,
            scaler=self._scaling.facts,
            warnings=tuple(self._heard.warnings),
            optimizers=tuple(self.steps.kinds),
            idle=self.batches.reach.idle,
            repeated=self.steps.repeated,
            cast=self.steps.cast,
            untaught=self.comparisons.untaught,
            scalings=scalings(self.model),
            outliving=self.batches.flow.outliving,
            taken_in_turns=self.steps.taken_in_turns,
            replicas=tuple(filter(None, [self._replicas.facts])),
        )

    @property
    def _copied(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self.steps.held.values() if ".original_module." in name))

    @property
    def step(self) -> RunFacts | None:
        """The first watched forward and backward; None where none ran."""
        first = self.batches.first
        return first and dataclasses.replace(first, base_grads=self._base_grads)

    @property
    def blockwise(self) -> BlockwiseFacts:
        """The blocks that were looked at, beside their twins."""
        on_cpu = all(p.device.type == "cpu" for p in self.model.parameters())
        return self.comparisons.facts(same_kernels=on_cpu and not self.batches.compiled)

    @property
    def meant(self) -> dict[str, nn.Parameter]:
        """The parameters that are meant to train: adapters, what an optimizer holds, and what ``trains`` names."""
        copied = self._copied
        held = {
            name: p
            for name, p in self.model.named_parameters()
            if p.requires_grad and name not in copied and id(p) in self.steps.held
        }
        woken = {name: p for name, p in self.model.named_parameters() if name in self._adapters}
        return {**owned(self.model, declared(self.model, self._training)), **held, **woken}

    @unharmed
    def _forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not self.model or internals.backward_runs():
            return
        self._heard.takes_gradients = torch.is_grad_enabled()
        if not torch.is_grad_enabled():
            self.batches.without_gradients(kwargs)
            return
        if self.steps.open and not self.steps.inside:
            self._close_step()
            if self.over:
                return
        if self.before is None:
            self._look_first()
        if not self.steps.inside:
            self.steps.look()
            self._replicas.look(self.steps.taken)
        if not (self.by_check or self.steps.inside or self._sharded):
            self.comparisons.draw()
        self._wake()
        self.comparisons.next_batch()
        self.batches.begin(args, kwargs, self.steps.rates)

    def _wake(self) -> None:
        """Adapters that train from now on, as of several that take turns, are meant to, even if they rest at the end."""
        train = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if self.before is not None and train != self._train:
            self._train, woken = train, owned(self.model).keys() & train
            self._adapters |= woken
            self.before = _thawed(self.before, woken, adapter=True)

    def _look_first(self) -> None:
        """Before the first forward that takes gradients: what the model is, and which blocks it has."""
        self.steps.name_parameters()
        self.before = snapshot(self.model, self.meant)
        self.comparisons.look()
        for name, layer in backends.quantized_layers(self.model):
            if getattr(layer, "bias", None) is not None:
                self.biases[f"{name}.bias"] = biases_after_forward(layer)

    @unharmed
    def _output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is self.model and torch.is_grad_enabled() and self.batches.any and not internals.backward_runs():
            self.batches.end(output)

    @unharmed
    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        closure = any(each is not None for each in (*args[1:], *kwargs.values()))  # accelerate passes None for none
        if not self.steps.begin(optimizer, ran=self.batches.any, closure=closure):
            return
        self._settle()
        if internals.backward_runs():
            self.comparisons.skip("an optimizer steps in the backward")
        elif not self.batches.any and not self.steps.open:
            self.comparisons.skip("the optimizer runs the model itself, in a closure")
        elif not self.steps.open:
            self.batches.finish()
            assert self.before is not None
            self.comparisons.compare(len(self.steps.taken) + 1, self.before)

    def _settle(self) -> None:
        """Before the first step: what is meant to train, now that an optimizer is there, and which others have a gradient."""
        if self.before is not None and not self.steps.taken:
            self.before = self._as_meant(self.before)
            grads = [n for n, p in self.model.named_parameters() if p.grad is not None]
            self._base_grads = tuple(n for n in grads if not self.before.parameters[n].adapter)

    def _as_meant(self, facts: ModelFacts) -> ModelFacts:
        """The snapshot with what is meant to train; a tied parameter has several names."""
        own = {facts.parameters[name].storage for name in self.meant if name in facts.parameters}
        return dataclasses.replace(
            facts,
            parameters={n: dataclasses.replace(p, adapter=p.storage in own) for n, p in facts.parameters.items()},
        )

    @unharmed
    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.steps.inside:
            self.steps.end(optimizer, ran=self.batches.any or self.steps.open)
            self._close_complete_step()
        elif self.steps.register(optimizer, ran=False):  # watching began in the closure of this step
            self.batches.taken()
            self.comparisons.remove()

    def _close_complete_step(self) -> None:
        if self.steps.complete:
            self._close_step()

    def _close_step(self) -> None:
        self.batches.finish()
        self.steps.close(self.batches.taken())
        self.batches.stepped(self.steps.stepped)
        self.comparisons.remove()
        if len(self.steps.taken) == self._training.steps:
            self.stop()

    @unharmed
    def scaled(self, scaler: Any) -> None:
        """A gradient scaler scaled a loss."""
        self.batches.scale = float(scaler.get_scale())
        self._scaling.scaled()

    @unharmed
    def unscales(self, optimizer: Any) -> None:
        """A gradient scaler is about to unscale the gradients of an optimizer."""
        self._scaling.unscales(optimizer)

    @unharmed
    def scaler_stepped(self, scaler: Any, optimizer: Any, *, taken: bool) -> None:
        """A gradient scaler was asked for a step of an optimizer, which it may have left out."""
        self._scaling.stepped(float(scaler.get_scale()), taken=taken)
        if not taken and self.steps.register(optimizer, ran=self.batches.any):
            self._settle()
            self.comparisons.unseen = self.comparisons.unseen or "a gradient scaler skipped every step"
            self.steps.skip(optimizer)
            self._close_complete_step()

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def _thawed(before: ModelFacts, names: Set[str], *, adapter: bool = False) -> ModelFacts:
    """The first snapshot, with what requires grad only later: a run may thaw one part after another."""
    later = {name: before.parameters[name] for name in names if name in before.parameters}
    thawed = {n: dataclasses.replace(p, requires_grad=True, adapter=adapter or p.adapter) for n, p in later.items()}
    return dataclasses.replace(before, parameters={**before.parameters, **thawed})
