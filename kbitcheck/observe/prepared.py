"""Judges a model as it stands, prepared by someone else, before or in the middle of training.

The caller's object is only read. What has to run runs on copies, and the random states are put back.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy
import torch
from kbitcheck_reference.adapters import adapter_parameters, enabled_biases, is_adapter_module
from torch import nn
from transformers import PreTrainedModel

from kbitcheck.core.cases import CaseSpec, Checkpointing
from kbitcheck.core.errors import Unavailable, UsageError, cause
from kbitcheck.core.facts import ModelFacts, RunFacts
from kbitcheck.models.inputs.text import draw
from kbitcheck.models.load import never_repacked, quiet
from kbitcheck.models.sources.live import Given
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Attached, Base
from kbitcheck.observe.probes import adapters as adapter_probe
from kbitcheck.observe.probes import layers, snapshot, step
from kbitcheck.observe.twin import twins as twin

# Rules whose facts a prepared model still shows, by itself or in a step of a copy.
JUDGED = frozenset({
    "KB101", "KB102", "KB103", "KB104", "KB105", "KB201", "KB202", "KB211", "KB301", "KB302", "KB303", "KB304", "KB305",
    "KB306", "KB307", "KB309", "KB401", "KB402", "KB403", "KB405", "KB406", "KB407", "KB408", "KB901", "KB903", "KB904",
    "KB905", "KB907", "KB908",
})  # fmt: skip
GONE = "needs the state before preparation, or the call itself: `kbitcheck impl` judges it"


def mode_of(model: nn.Module) -> Checkpointing:
    """How the model checkpoints, from the flags and functions of its modules."""
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    if not on:
        return "off"
    functions = [getattr(m, "_gradient_checkpointing_func", None) for m in on]
    asked = {f.keywords.get("use_reentrant") for f in functions if isinstance(f, functools.partial)}
    if asked == {True}:
        return "reentrant"
    return "non-reentrant" if asked == {False} else "default"


def owned(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that adapters own and train, by name; a second adapter that rests is no part of it."""
    ids = adapter_parameters(model)
    if not ids:
        return {}
    ids |= enabled_biases(model, ids)
    resting = _resting(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in ids and (parameter.requires_grad or not resting & set(name.split(".")))
    }


def _resting(model: nn.Module) -> set[str]:
    """Names of PEFT's adapters that are loaded and not active."""
    known: set[str] = set(getattr(model, "peft_config", None) or {})
    layers = [getattr(m, "active_adapters", None) for m in model.modules() if is_adapter_module(m)]
    return known.difference(*(active for active in layers if isinstance(active, list)))


@contextmanager
def undisturbed(*, threads: int) -> Iterator[None]:
    """Put every random state back afterwards, say nothing, and compile nothing.

    bitsandbytes compiles a kernel for each odd shape on a CPU: half a minute a model. On a tiny one more threads than
    one only wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    states = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"), quiet():
            yield
    finally:
        torch.set_num_threads(before)
        random.setstate(states[0])
        numpy.random.set_state(states[1])


class Present(Base):
    """Copies of a model as it stands, with its own adapters or, where it has none, the reference's.

    Raises:
        Unavailable: no copy of the model can run by itself.
    """

    def __init__(self, model: Any, spec: CaseSpec, batch: Mapping[str, torch.Tensor] | None) -> None:
        if tied := captures(model):
            raise Unavailable(f"nothing can run on a copy: {tied} holds on to the model itself")
        try:
            self.pristine = never_repacked(copy.deepcopy(model))
        except (RuntimeError, TypeError) as error:
            raise Unavailable(f"the model cannot be copied: {error}".splitlines()[0]) from None
        self.pristine.state_dict()  # on a CPU, bitsandbytes undoes its repacking for inference when it saves
        step.set_dropout(self.pristine, 0.0)  # or no step compares with another; KB307 raises it
        self.source = Given(self.pristine)
        self.facts = snapshot.snapshot(self.pristine)
        self.batch: step.Batch = batch or _drawn(self.pristine, spec.seed)
        adapters = owned(self.pristine)
        self.targets = [] if adapters else adapter_probe.target_layers(self.pristine, spec.targets)
        self._dtypes = {name: p.dtype for name, p in adapters.items()}
        self.weights, self.misread = layers.originals(self.pristine)
        self._twins = {}

    def attach(self, model: nn.Module, spec: CaseSpec) -> Attached:
        """The model's own adapters, in their own dtypes; what is zero is drawn, or half their gradients would be zero."""
        if not self._dtypes:
            return super().attach(model, spec)
        found = {name: p for name, p in model.named_parameters() if name in self._dtypes}
        for name, parameter in found.items():
            parameter.data = parameter.data.to(self._dtypes[name])
        adapter_probe.draw({name: p for name, p in found.items() if not p.any()}, spec.seed)
        return model, found

    def twins(self, spec: CaseSpec) -> twin.Twins:
        try:
            return super().twins(spec)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            told = cause(error)
            raise Unavailable(f"the float64 twin of this model cannot be computed ({told})") from None


class PresentCase(Case):
    """The facts that a prepared model still shows."""

    live = True

    def __init__(self, spec: CaseSpec, model: Any, batch: Mapping[str, torch.Tensor] | None) -> None:
        self._given = model
        self._given_batch = batch
        self.spec = spec
        self.prepare = _as_it_is
        self.case = spec.id
        self.profile = spec.profile
        self.freezes = spec.freezes
        self.checkpointing = spec.checkpointing

    @cached_property
    def _base(self) -> Base:  # type: ignore[override]
        return Present(self._given, self.spec, self._given_batch)

    @property
    def _model(self) -> Any:
        return self._base.copy()

    @cached_property
    def prepared(self) -> ModelFacts:
        return snapshot.snapshot(self._given, owned(self._given), keys=False)

    @property
    def base(self) -> ModelFacts:
        """The model without its adapters; whether it checkpointed before is not known."""
        found = self.prepared
        return dataclasses.replace(
            found,
            parameters={n: p for n, p in found.parameters.items() if not p.adapter},
            modules={n: dataclasses.replace(m, checkpointing=None) for n, m in found.modules.items()},
        )

    @property
    def loaded(self) -> ModelFacts:
        raise Unavailable(GONE)

    @cached_property
    def wrapped(self) -> ModelFacts:
        if any(p.adapter for p in self.prepared.parameters.values()):
            return self.prepared
        return snapshot.snapshot(*self._attached)

    @property
    def run(self) -> RunFacts:
        """One step of a copy. A gradient that a base parameter holds already is told too."""
        found = super().run
        held = [n for n, p in self.prepared.parameters.items() if p.has_grad and not p.adapter]
        return dataclasses.replace(found, base_grads=tuple(dict.fromkeys((*found.base_grads, *held))))

    @property
    def unprepared(self) -> Case:
        raise Unavailable("the model before its preparation is not there to compare with")

    bare = unprepared

    @property
    def remote_code(self) -> bool:
        return Given(self._given).remote_code


def _drawn(model: nn.Module, seed: int) -> step.Batch:
    """A batch for the model of transformers that is inside whatever wraps it.

    Raises:
        UsageError: there is none, or none can be made for it.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        raise UsageError(f"{type(model).__name__} holds no model of transformers: give batch=")
    return draw(inner, batch=2, seq_len=24, seed=seed)


def _as_it_is(model: Any) -> Any:
    return model


def captures(model: nn.Module) -> str:
    """The name of a hook or method of the model that keeps the model in a closure, which no copy would replace; or "".

    A bound method or an argument of a partial is copied with the model; a closure is not.
    """
    own = {id(m) for m in model.modules()}
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        for function in (*hooks, *vars(module).values()):
            if _closes_over(function, own):
                return f"{name or type(module).__name__}.{getattr(function, '__qualname__', 'function')}"
    return ""


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
        if depth and isinstance(held, Callable) and _closes_over(held, own, depth - 1):  # type: ignore[arg-type]
            return True
    return False
