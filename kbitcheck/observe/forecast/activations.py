"""What a training step holds, predicted: the model's code runs on fake tensors, and storages are counted as in
``kbitcheck.observe.probes.memory``. Of blocks that compute the same, one runs; the others count as that one did.
"""

import gc
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor, nn

from kbitcheck.models.blocks import Signature, is_block, is_plain
from kbitcheck.observe import internals
from kbitcheck.observe.forecast.cuda_autocast import Watcher
from kbitcheck.observe.forecast.fake_tensors import Counted, World
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.forecast.storages import Log, Trace, whole
from kbitcheck.observe.forecast.thinning import Passed
from kbitcheck.observe.garbage import collect_young, collecting_on_request, only_new_garbage
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.probes.live import hidden_states


@dataclass(frozen=True, slots=True)
class Measured:
    """A step on fake tensors, in bytes; ``places`` is what was alive when each storage was made, in order.

    ``attention`` counts the blocks that took each kernel of scaled-dot-product attention.
    ``accumulated`` are gradients that were there before, which no place counts.
    """

    held: int
    logits: int
    places: Sequence[int]
    log: Log = field(default_factory=Log)
    gradients: frozenset[int] = frozenset()
    attention: Mapping[str, int] = field(default_factory=dict)
    accumulated: int = 0

    def trace(self) -> Trace:
        """The storages of the step, those of blocks that did not run too; none if they do not add up to the step's peak."""
        trace = whole(self.log, gradients=self.gradients, logits=self.logits)
        return trace if trace.peak == max(self.places) else Trace((), ())

    @property
    def peak(self) -> int:
        return max(self.places) + self.accumulated


def measure(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    world: World,
    runtime: Runtime,
    *,
    reentrant: bool | None,
    accumulated: int = 0,
) -> Measured:
    """A step of a model that was moved to the world, under reentrant or non-reentrant checkpointing; None: without.

    ``accumulated`` is the bytes of gradients that are there already and stay; 0 where there are none.
    """
    fed, live = _fed(model, batch, world, runtime)
    watch = _Watch(model, live)
    step.clear_gradients(model)
    floor = live.now
    if accumulated:
        for parameter in model.parameters():
            if parameter.requires_grad:
                with world.mode:
                    parameter.grad = torch.empty_like(parameter)
    with _running(model, watch, live, world, runtime, reentrant):
        with runtime.autocasting():
            output = model(**step.feed(model, fed))
        output = runtime.returned(output)
        loss, logits = output["loss"], output["logits"].nbytes
        if not runtime.keeps_output:
            del output
        gc.collect()
        watch.turn()
        held = live.now - floor + watch.missing
        if loss.requires_grad:
            loss.backward()
        places = [alive - floor for alive in watch.places()]
        attention = dict(watch.attention)
        keys = (internals.storage_id(p.grad) for p in model.parameters() if p.grad is not None)
        gradients = frozenset(n for n in map(live.log.number, keys) if n is not None)
    log = live.log
    log.close()
    step.clear_gradients(model)
    return Measured(held, logits, places, log, gradients, attention, accumulated)


def called(function: Callable[[], Any], model: nn.Module, world: World, runtime: Runtime) -> Any:
    """What a function of the model returns that is called as in a forward of ``measure``."""
    _, live = _fed(model, {}, world, runtime, numbers=True)
    with _running(model, _Watch(model, live), live, world, runtime, None), torch.no_grad(), runtime.autocasting():
        return function()


def _fed(
    model: nn.Module, batch: Mapping[str, Tensor], world: World, runtime: Runtime, *, numbers: bool = False
) -> tuple[dict[str, Tensor], Counted]:
    """The batch of a step, and what counts it. Integers that have numbers keep them."""
    kept = {name for name, t in batch.items() if t.device.type != "meta" and not t.is_floating_point()}
    fed = {name: t if name in kept else world.tensor(t) for name, t in batch.items()}
    existing = (*world.tensors, *(fed[name] for name in kept))
    experts = {n for m in model.modules() if isinstance(n := getattr(m, "num_experts", None), int)}
    return fed, Counted(existing, runtime.device, world.results, numbers=numbers or bool(kept), experts=experts)


@contextmanager
def _running(
    model: nn.Module, watch: "_Watch", live: Counted, world: World, runtime: Runtime, reentrant: bool | None
) -> Iterator[None]:
    with (
        only_new_garbage(),
        collecting_on_request(),
        _checkpointing(model, reentrant, watch),
        switches.cache_off(model),
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        world.entered(runtime, watch),
        live,
        watch,
    ):
        warnings.simplefilter("ignore")
        yield


@dataclass(slots=True)
class _Ran:
    """Bytes of one block: ``grown`` from its entry to the next, ``left`` after its backward.

    ``climbs`` and ``rises``: bytes alive at each storage, above those when the forward, and the backward, came to it.
    """

    arguments: Signature = ()
    entered: int = 0
    grown: int = 0
    climbs: list[int] = field(default_factory=list)
    returned: int = 0
    rises: list[int] = field(default_factory=list)
    left: int = 0
    rest: tuple[Any, ...] | None = None


class _Watch(Watcher):
    """Hooks that follow a step from block to block and back. Bytes throughout.

    ``missing`` is what blocks that were passed would hold by now: as much as those that they equal, until the backward
    comes back to them, and the adapters' gradients from then on.
    """

    def __init__(self, model: nn.Module, live: Counted) -> None:
        self._model, self._live = model, live
        self._ran: dict[nn.Module, _Ran] = {}
        self._standing: set[nn.Module] = set()
        self._open: _Ran | None = None
        self._unmarked: nn.Module | None = None  # a block that was left, in whose output no gradient is watched yet
        self.block: nn.Module | None = None
        self._passed: Counter[nn.Module] = Counter()
        self.missing = 0
        self._forward: list[int] = []
        self._backward = False
        self._now: _Ran | None = None
        self._back: list[nn.Module] = []
        self._between: list[tuple[list[int], int]] = []  # alive between two marks, and how many were passed till then
        self._entries: list[tuple[int, nn.Module]] = []  # what was alive when a block was passed on the way back
        self._hooks = ExitStack()
        self._names = {module: name for name, module in model.named_modules()}
        self._attends: dict[nn.Module | None, list[str]] = defaultdict(list)
        self.attention: Counter[str] = Counter()

    def __enter__(self) -> Self:
        for module in self._model.modules():
            if isinstance(module, Passed):
                module.watch = self
                self._standing.add(module.__dict__["like"])
            elif is_block(module):
                self._hooks.enter_context(module.register_forward_pre_hook(self._entering, with_kwargs=True))
                self._hooks.enter_context(module.register_forward_hook(self._leaving, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        for module in self._model.modules():
            if isinstance(module, Passed):
                module.watch = None
        self._ran.clear()

    def places(self) -> list[int]:
        """What is alive when each storage of the whole step is made."""
        self._mark(None)
        offsets = list(accumulate((self._ran[like].left for like in self._back), initial=self.missing))
        places = [*self._forward, *(now + offsets[passed] for alive, passed in self._between for now in alive)]
        for i, (now, like) in enumerate(self._entries):
            places += [now + offsets[i] + rise for rise in self._ran[like].rises]
        return places

    def attends(self, kernel: str) -> None:
        """Attention takes a kernel, in the block that runs or outside of all. A block counts once, however often it attends."""
        if not self._backward and kernel not in self._attends[self.block]:
            if self.block is not None:
                self._attends[self.block].append(kernel)
            self.attention[kernel] += 1

    @contextmanager
    def dropping(self, block: Any) -> Iterator[None]:
        """Inside, what blocks hold that are like ``block`` becomes less by what is freed."""
        if self._backward:
            yield
            return
        self._close()
        before, self._live.log.dropping = self._live.now, True
        yield
        self._live.log.dropping = False
        self.missing -= (before - self._live.now) * self._passed[block]

    def turn(self) -> None:
        """The forward is over."""
        self._close()
        self._live.log.mark("turn")
        self._live.log.in_forward = False
        self._backward = True
        self._live.trace = [self._live.now]

    def passed(self, block: nn.Module, like: nn.Module, args: Any, kwargs: Any) -> Any:
        """One block handed on: its input, in the form in which the block it is like returned."""
        ran = self._ran[like]
        self._live.log.mark("enter", self._names[block], self._names[like])
        self._close()
        if ran.arguments != _arguments(args, kwargs):
            raise NotImplementedError(f"a {type(like).__name__} is called in another way than one that is like it")
        self._forward += [self._live.now + self.missing + climb for climb in ran.climbs]
        self.missing += ran.grown
        self._passed[like] += 1
        self.attention.update(self._attends[like])
        hidden = hidden_states(args, kwargs)
        if hidden.requires_grad:
            hidden = hidden.view_as(hidden)  # the same storage, with a place of its own in the graph
            hidden.register_hook(lambda gradient: self._came_back(block, like))
        return hidden if ran.rest is None else (hidden, *ran.rest)

    def _entering(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._backward:
            self._live.log.in_forward = True
        else:
            self._close()
            self._live.log.mark("enter", self._names[module])
            self.block = module
            self._open = self._ran[module] = _Ran(arguments=_arguments(args, kwargs), entered=self._live.now)

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._backward:
            self._live.log.in_forward = False
            return
        self._live.log.mark("leave", self._names[module])
        self.block = None
        ran = self._ran[module]
        if module in self._standing and isinstance(output, tuple):
            ran.rest = output[1:]
        self._unmarked = module
        self.returned(output)

    def returned(self, output: Any) -> None:
        """A block's output, from its forward or from its checkpoint: reentrant ones run forwards without a graph."""
        module, first = self._unmarked, output[0] if isinstance(output, tuple) else output
        if module is not None and isinstance(first, Tensor) and first.requires_grad:
            self._unmarked = None
            first.register_hook(lambda gradient: self._mark(self._ran[module], self._names[module]))

    def _close(self) -> None:
        if self._live.trace:
            collect_young()  # what else were freed at some later place, another in each run
        alive, self._live.trace = self._live.trace, []
        self._forward += [now + self.missing for now in alive]
        if self._open is not None:
            self._open.grown = self._live.now - self._open.entered
            self._open.climbs = [now - self._open.entered for now in alive]
            self._open = None

    def _mark(self, ran: _Ran | None, block: str = "") -> None:
        """The backward comes to a block: what was alive since the last mark belongs to what came before."""
        if len(self._live.trace) > 1:
            collect_young()
        alive = self._live.trace
        self._between.append((alive, len(self._back)))
        if self._now is not None:
            self._now.rises = [now - self._now.returned for now in alive]
            self._now.left = self._live.now - self._now.returned
        self._now = ran
        self._live.trace = [self._live.now]
        if ran is not None:
            self._live.log.mark("back", block)
            ran.returned = self._live.now

    def _came_back(self, block: nn.Module, like: nn.Module) -> None:
        """The backward comes to a block that is not there."""
        self._mark(None)
        self._live.log.mark("back", self._names[block], self._names[like])
        self._entries.append((self._live.now, like))
        self._back.append(like)


def _arguments(args: Any, kwargs: Any) -> Signature:
    def described(value: Any) -> object:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype, value.requires_grad
        if isinstance(value, Mapping):
            return tuple((k, described(v)) for k, v in sorted(value.items()))
        if isinstance(value, (tuple, list)):
            return tuple(map(described, value))
        return value if is_plain(value) else type(value).__qualname__

    return described(args), described(kwargs)


@contextmanager
def _checkpointing(model: nn.Module, reentrant: bool | None, watch: _Watch) -> Iterator[None]:
    """Checkpointing on or off in every block, without the generators' states, which no operator makes."""

    def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = {"use_reentrant": reentrant, "preserve_rng_state": False}
        output = switches.CHECKPOINT(function, *args, **{**kwargs, **chosen})
        watch.returned(output)
        return output

    blocks = [
        m
        for m in model.modules()
        if isinstance(getattr(m, "gradient_checkpointing", None), bool) and not isinstance(m, Passed)
    ]
    flags = ((m, "gradient_checkpointing", reentrant is not None) for m in blocks)
    with switches.attributes(*flags), switches.checkpointed_by(checkpoint, blocks):
        yield
