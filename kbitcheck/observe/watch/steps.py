"""What the steps of optimizers do to the parameters of a watched model."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import nn

from kbitcheck.core.facts import MicroBatch, Update, WatchedStep
from kbitcheck.observe import internals
from kbitcheck.observe.watch import updates
from kbitcheck.observe.watch.built import Built


@dataclass(slots=True)
class _Open:
    """One step, which several optimizers may take between two forwards. ``stepped`` are the ids of what they hold."""

    rate: float = 0.0
    peak: float = 0.0
    skipped: bool = False
    updates: dict[str, Update] = field(default_factory=dict)
    stepped: set[int] = field(default_factory=set)
    undone: dict[str, float] = field(default_factory=dict)
    remembered: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)


class Steps:
    """Steps of the optimizers that hold a model's parameters, or of ``optimizers`` alone where there are any."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Any],
        when_strange: Callable[[], None] = lambda: None,
        built: Built | None = None,
    ) -> None:
        self.taken: list[WatchedStep] = []
        self.names: dict[int, str] = {}  # of the model's parameters
        self._parameters: list[nn.Parameter] = []
        self.held: dict[int, str] = {}
        self.foreign = 0
        self.kinds: list[str] = []  # classes of the optimizers
        self.inside = False  # an optimizer's step, in which a closure may run the model
        self._written: dict[
            int, int
        ] = {}  # how often each gradient was written to before the step, unless a closure makes it
        self._model, self._when_strange = model, when_strange
        self._optimizers = optimizers
        self._open: _Open | None = None
        self._values: dict[str, torch.Tensor] = {}
        self._wide: dict[int, torch.Tensor] = {}
        self.repeated: dict[str, str] = {}  # how a parameter is stepped twice, by its name
        self.cast: dict[str, str] = {}  # the dtype in which an optimizer took a parameter that has been narrowed since
        self._built = built or Built()
        for optimizer in optimizers:
            self._built.note(_parameters(optimizer))
        self._remembered: set[str] = set()  # by the optimizer that steps
        self._forgotten: set[str] = set()  # parameters of which it has no state any more
        self._with_state: set[str] = set()  # parameters of which an optimizer has a state
        self._used: dict[
            str, tuple[Any, int]
        ] = {}  # the gradients of the last steps, and how often each was written to
        self._moved: dict[
            str, tuple[torch.Tensor, float]
        ] = {}  # what the last step moved: its values before, and how far
        self._undone: dict[str, float] = {}
        self._several = [weakref.ref(each) for each in optimizers]  # those that step, or may
        self._last: Any = None  # the one that stepped last
        self.taken_in_turns = 0

    def name_parameters(self) -> None:
        """Take the model's parameters as they are now for its own."""
        named = dict(self._model.named_parameters())
        self.names = {id(parameter): name for name, parameter in named.items()}
        self._parameters = list(named.values())

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of the optimizers, the largest of each one's groups."""
        there = filter(None, (each() for each in self._several))
        return tuple(max((float(group["lr"]) for group in each.param_groups), default=0.0) for each in there)

    @property
    def open(self) -> bool:
        """Whether an optimizer stepped since the last step was closed."""
        return self._open is not None

    @property
    def complete(self) -> bool:
        """Whether each named optimizer stepped, or everything that requires grad was stepped."""
        if self._open is None:
            return False
        ids = {id(p) for p in self._parameters if p.requires_grad}
        if self._optimizers:
            ids = {id(p) for optimizer in self._optimizers for p in _parameters(optimizer)}
        return ids <= self._open.stepped

    def begin(self, optimizer: Any, *, ran: bool, closure: bool = False) -> bool:
        """An optimizer's step begins. Whether it is the model's; ``ran``: a forward ran since the last; ``closure``: it runs the model."""
        if not self.register(optimizer, ran=ran):
            if self.held and not self._mine(optimizer):  # it steps another model
                self._when_strange()
            return False
        mine = self._mine(optimizer)
        self.inside = True
        self._written = {id(p): internals.version(p.grad) for p in mine if p.grad is not None and not closure}
        self._look_for_repeats(mine, closure=closure)
        self._look_for_casts(mine)
        self._values = {self.names[id(p)]: p.detach().clone() for p in mine}
        states = getattr(optimizer, "state", {})
        self._remembered = {self.names[id(p)] for p in mine if states.get(p)}
        self._forgotten = {self.names[id(p)] for p in mine} & self._with_state - self._remembered
        self._take_turn(optimizer, mine)
        try:
            self._wide = updates.in_float32(optimizer, mine)
        except (
            Exception
        ):  # an optimizer of a kind that cannot be stepped beside itself: nothing is said of its rounding
            self._wide = {}
        return True

    def end(self, optimizer: Any, *, ran: bool) -> None:
        """An optimizer's step has ended."""
        self.inside = False
        if ran:
            step = self._stepped(optimizer)
            step.remembered |= self._remembered
            step.forgotten |= self._forgotten
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = self.names.get(id(parameter))
                    if name and internals.local(parameter).numel():  # this process may hold no row of it
                        step.updates[name] = self._update(optimizer, group, name, parameter)
            self._note_states(optimizer)
        self.forget()

    def _update(self, optimizer: Any, group: Mapping[str, Any], name: str, parameter: torch.Tensor) -> Update:
        before, wide, rate = self._values[name], self._wide.get(id(parameter)), float(group["lr"])
        update = updates.update(before, parameter.detach(), wide, rate=rate, gradient=parameter.grad)
        if parameter.grad is not None and self._written.get(id(parameter)) == internals.version(parameter.grad):
            settings = {"rate": rate, "decay": float(group.get("weight_decay") or 0.0), "epsilon": _epsilon(group)}
            update = updates.beside_decay(update, before, parameter, parameter.grad, **settings)
        if isinstance(optimizer, updates.ALONG_GRADIENT):
            update = updates.along_gradient(update, before, parameter.grad, rate=rate)
        if parameter.grad is None and not parameter.requires_grad:
            update = dataclasses.replace(update, gradient="frozen")
        if update.moved:
            self._moved[name] = before, _distance(parameter, before)
        if parameter.grad is not None:
            self._used[name] = weakref.ref(parameter.grad), internals.version(parameter.grad)
        return update

    def look(self) -> None:
        """The first forward after a step begins: has anything but an optimizer taken back what the step did?"""
        named = {self.names[id(p)]: p for p in self._parameters}
        for name, (before, far) in self._moved.items():
            self._undone[name] = 1 - _distance(named[name], before) / far
        self._moved = {}

    def _look_for_repeats(self, mine: Sequence[torch.Tensor], *, closure: bool) -> None:
        """Parameters that two groups hold, or whose gradient a step has used already."""
        seen: set[int] = set()
        for parameter in mine:
            name = self.names[id(parameter)]
            if id(parameter) in seen:
                self.repeated[name] = "held in two groups of an optimizer"
            seen.add(id(parameter))
            used, version = self._used.get(name, (None, 0))
            gradient = parameter.grad
            if gradient is None or used is None or gradient is not used() or closure:
                continue
            if internals.version(gradient) == version:
                self.repeated.setdefault(name, "stepped twice along one gradient, as by two optimizers")

    def _look_for_casts(self, mine: Sequence[torch.Tensor]) -> None:
        """Parameters that something cast to half precision after an optimizer had taken them in float32."""
        self._built.note(mine)
        for parameter in mine:
            if parameter.dtype in updates.LOW and self._built.dtype(parameter) is torch.float32:
                self.cast[self.names[id(parameter)]] = "float32"

    def _take_turn(self, optimizer: Any, mine: Sequence[torch.Tensor]) -> None:
        """Count the parameters that an optimizer has in common with the one before it, if it comes back after that: none forgot a state."""
        last = self._last and self._last()
        comes_back = last is not None and last is not optimizer and any(each() is optimizer for each in self._several)
        both = {id(p) for p in mine} & {id(p) for p in _parameters(last)} if comes_back else set()
        if both:
            self.taken_in_turns = max(self.taken_in_turns, len(both))
            self.taken = [dataclasses.replace(step, forgotten=()) for step in self.taken]
        self._last = weakref.ref(optimizer)
        if not any(each() is optimizer for each in self._several):
            self._several.append(weakref.ref(optimizer))

    def _note_states(self, optimizer: Any) -> None:
        """Which parameters an optimizer keeps a state of, such as averages of gradients."""
        states = getattr(optimizer, "state", {})
        for parameter in self._mine(optimizer):
            if states.get(parameter):
                self._with_state.add(self.names[id(parameter)])

    def skip(self, optimizer: Any) -> None:
        """A gradient scaler left a step out."""
        self._stepped(optimizer).skipped = True

    def close(self, batches: Sequence[MicroBatch]) -> None:
        """The step is over: the next forward begins, or everything that trains was stepped."""
        if self._open is not None:
            step = self._open
            skipped = step.skipped and not step.updates
            self.taken.append(
                WatchedStep(
                    rate=step.rate,
                    peak=step.peak,
                    batches=tuple(batches),
                    updates=step.updates,
                    skipped=skipped,
                    undone=step.undone,
                    remembered=len(step.remembered),
                    forgotten=tuple(sorted(step.forgotten)),
                )
            )
        self._open = None

    @property
    def stepped(self) -> list[nn.Parameter]:
        """The parameters that the last step updated."""
        names = self.taken[-1].updates if self.taken else {}
        return [p for p in self._parameters if self.names[id(p)] in names]

    def forget(self) -> None:
        """Drop what is kept while an optimizer steps."""
        self._values, self._wide, self._written = {}, {}, {}

    def stop(self) -> None:
        """Drop all that is kept of the parameters."""
        self.forget()
        self._moved = {}

    def register(self, optimizer: Any, *, ran: bool) -> bool:
        """Note what an optimizer holds. Whether its steps are the model's, or may be: no other holds its parameters."""
        if self._optimizers and not any(optimizer is each for each in self._optimizers):
            return False
        mine = self._mine(optimizer)
        if not mine and (self.held or not (ran or self.open)):
            return False
        kind = type(optimizer).__name__
        if kind not in self.kinds:
            self.kinds.append(kind)
        self.held.update((id(p), self.names[id(p)]) for p in mine)
        self.foreign = max(self.foreign, len(_parameters(optimizer)) - len(mine))
        return True

    def _mine(self, optimizer: Any) -> list[torch.Tensor]:
        return [p for p in _parameters(optimizer) if id(p) in self.names]

    def _stepped(self, optimizer: Any) -> _Open:
        if self._open is None:
            self._open, self._undone = _Open(undone=self._undone), {}
        step = self._open
        for group in optimizer.param_groups:
            step.rate = max(step.rate, float(group["lr"]))
            step.peak = max(step.peak, float(group.get("initial_lr", group["lr"])))
        step.stepped |= set(map(id, _parameters(optimizer)))
        return step


def _epsilon(group: Mapping[str, Any]) -> float:
    """What an optimizer such as Adam adds to its denominators; 0 where it has none, or several as Adafactor has."""
    epsilon = group.get("eps")
    return float(epsilon) if isinstance(epsilon, Real) else 0.0


def _distance(parameter: torch.Tensor, before: torch.Tensor) -> float:
    return float((internals.local(parameter.detach()).float() - internals.local(before).float()).norm())


def _parameters(optimizer: Any) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside what accelerate wraps round it."""
    return getattr(optimizer, "optimizer", optimizer)


def optimizers_of(optimizer: Any) -> list[Any]:
    """A caller's one optimizer, or several, as they are inside; none for None."""
    several = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    return [inner_optimizer(each) for each in several if each is not None]
