"""What a training step holds, predicted: the model's own code runs on fake tensors, and storages are counted.

It is counted as ``kbitcheck.probes.memory`` counts a real step. Blocks that are proven alike are run twice; each further
one is passed through and counted as the second was.
"""

from __future__ import annotations

import gc
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kbitcheck.facts import HeldFacts
from kbitcheck.probes import step
from kbitcheck.probes.live import Live, tensors
from kbitcheck.probes.snapshot import is_block, tower
from kbitcheck.static.fake import World

RUN = 2  # blocks of a kind that are run: the first may be met before a steady state
PLACE = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "idx", "training"})

Signature = tuple[object, ...]


def signature(block: nn.Module) -> Signature:
    """Equal for blocks that compute the same on other numbers: classes, settings, shapes, dtypes and what is trained.

    A block's own place in the stack is left out; what a model makes of it (a window, a kind of attention) is a setting.
    """
    found: list[object] = []
    for name, module in block.named_modules():
        settings = sorted((k, repr(v)) for k, v in vars(module).items() if k not in PLACE and _plain(v))
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        shapes = [(n, type(t).__name__, tuple(t.shape), t.dtype, t.requires_grad) for n, t in own]
        found.append((name, type(module).__qualname__, tuple(settings), tuple(shapes)))
    return tuple(found)


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


class Passed(nn.Module):
    """Stands for a block that is like one that runs: hands its input on, and tells when it is passed, both ways.

    What the model reads of a block beside calling it (a kind of attention, say) is still the block's. ``standing_for``
    makes it of the block's class as well, by which models find the blocks whose outputs they collect.
    """

    @classmethod
    def standing_for(cls, block: nn.Module, like: nn.Module) -> Passed:
        """What stands for a block that is like another."""
        made: type[Passed] = type(cls.__name__, (cls, type(block)), {})
        return made(block, like)

    def __init__(self, block: nn.Module, like: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(block=block, like=like)  # no children: neither is run, moved or counted from here
        self.gradient_checkpointing = False
        self.watch: _Watch | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.watch is not None
        return self.watch.passed(self.__dict__["like"], args, kwargs)


def thin(model: nn.Module) -> dict[str, nn.Module]:
    """Put ``Passed`` in the place of every block after the second of its kind in its tower, but the last.

    The last is run because its output may not be read, as in LLaVA's vision tower: then nothing of it is kept. Returns
    the blocks that stand for others, by name.
    """
    kinds: dict[tuple[str, Signature], list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if is_block(module):
            kinds[tower(name), signature(module)].append(name)
    standing = {}
    for names in kinds.values():
        if len(names) > RUN + 1:
            like = standing[names[RUN - 1]] = model.get_submodule(names[RUN - 1])
            for name in names[RUN:-1]:
                parent, _, child = name.rpartition(".")
                stand_in = Passed.standing_for(model.get_submodule(name), like)
                model.get_submodule(parent)._modules[child] = stand_in
    return standing


class Step:
    """A prepared model with adapters, thinned and moved to a world without numbers; measures training steps of it.

    Args:
        model: on the meta device, thinned, prepared, with adapters; it is moved and cannot be used otherwise any more.
        world: whose kernels are assumed.
        adapters: bytes of the adapters of each block that stands for others.
        autocast: how training runs, where it does so under autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        adapters: Mapping[nn.Module, int],
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.model, self.world, self.adapters, self.autocast = model, world, adapters, autocast
        world.move(model)
        model.train()
        self._own = list(world.tensors)
        self.logits = 0

    def measure(self, batch: Mapping[str, Tensor], *, reentrant: bool | None) -> HeldFacts:
        """A step on a batch (of any device) under reentrant or non-reentrant checkpointing; None: without.

        ``logits`` is afterwards what the logits took, in bytes.
        """
        fed = {name: self.world.tensor(t) for name, t in batch.items()}
        live = Live([*self._own, *fed.values()])
        watch = _Watch(self.model, live, self.adapters)
        step.clear_gradients(self.model)
        floor = live.now
        with (
            _checkpointing(self.model, reentrant),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            self.world.entered(),
            live,
            watch,
        ):
            warnings.simplefilter("ignore")
            with self.autocast() if self.autocast else nullcontext():
                output = self.model(**step.feed(self.model, fed))
            gc.collect()
            watch.turn()
            held = live.now - floor + watch.missing
            self.logits = output.logits.nbytes
            if output.loss.requires_grad:
                output.loss.backward()
            peak = watch.peak - floor
        del output
        step.clear_gradients(self.model)
        return HeldFacts(held=held, peak=peak)


@dataclass(slots=True)
class _Kind:
    """What one block that stands for others takes: its bytes from its entry to the next, and more in its backward."""

    arguments: Signature = ()
    entered: int = -1
    grown: int = 0
    entry: int = -1
    rise: int = 0
    rest: tuple[Any, ...] | None = None


class _Watch:
    """Hooks that follow a step from block to block. Inside, everything is in bytes.

    ``missing`` is what the blocks that were passed would hold. In the backward ``peak`` adds it to what is alive, less
    what is passed on the way back, plus the gradients of adapters that are not there.
    """

    def __init__(self, model: nn.Module, live: Live, adapters: Mapping[nn.Module, int]) -> None:
        self._model, self._live, self._adapters = model, live, adapters
        self._kinds: dict[nn.Module, _Kind] = {}
        self._open: _Kind | None = None
        self._passes: list[nn.Module] = []
        self._backward = False
        self._now: _Kind | None = None
        self._waiting: list[tuple[nn.Module, int]] = []
        self.missing = 0
        self._top = 0
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for module in self._model.modules():
            if isinstance(module, Passed):
                module.watch = self
            elif is_block(module):
                self._handles.append(module.register_forward_pre_hook(self._entering, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leaving))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._model.modules():
            if isinstance(module, Passed):
                module.watch = None
        self._kinds.clear()

    def turn(self) -> None:
        """The forward is over: add up what the blocks that were passed would hold."""
        self._backward = True
        self.missing = sum(self._kinds[like].grown for like in self._passes)
        self._live.peak = self._live.now

    @property
    def peak(self) -> int:
        """The highest that the backward came to, with everything that is not there."""
        self._mark(None)
        return max(self._top, *(base + self._kinds[like].rise for like, base in self._waiting), 0)

    def passed(self, like: nn.Module, args: Any, kwargs: Any) -> Any:
        """One block handed on: its input, in the form in which the block it is like returned."""
        kind = self._kinds[like]
        self._close()
        if kind.arguments != _arguments(args, kwargs):
            raise NotImplementedError(f"a {type(like).__name__} is called in another way than one that is like it")
        self._passes.append(like)
        hidden = _hidden(args, kwargs)
        if hidden.requires_grad:
            hidden = hidden.view_as(hidden)  # the same storage, with a place of its own in the graph
            hidden.register_hook(lambda gradient: self._returned(like))
        return hidden if kind.rest is None else (hidden, *kind.rest)

    def _entering(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._backward:
            self._close()
            self._open = self._kinds[module] = _Kind(arguments=_arguments(args, kwargs), entered=self._live.now)

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._backward:
            return
        kind = self._kinds[module]
        first = output[0] if isinstance(output, tuple) else output
        if module in self._adapters and isinstance(output, tuple):
            kind.rest = output[1:]
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(lambda gradient: self._mark(kind))

    def _close(self) -> None:
        if self._open is not None:
            self._open.grown = self._live.now - self._open.entered
            self._open = None

    def _mark(self, kind: _Kind | None) -> None:
        """The backward comes to a block: what was highest since the last mark belongs to what came before."""
        self._top = max(self._top, self._live.peak + self.missing)
        if self._now is not None:
            self._now.rise = self._live.peak - self._now.entry
        self._now = kind
        self._live.peak = self._live.now
        if kind is not None:
            kind.entry = self._live.now

    def _returned(self, like: nn.Module) -> None:
        """The backward comes to a block that is not there."""
        self._mark(None)
        self._waiting.append((like, self._live.now + self.missing))
        self.missing += self._adapters.get(like, 0) - self._kinds[like].grown


def _arguments(args: Any, kwargs: Any) -> Signature:
    def described(value: Any) -> object:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype, value.requires_grad
        if isinstance(value, Mapping):
            return tuple((k, described(v)) for k, v in sorted(value.items()))
        if isinstance(value, (tuple, list)):
            return tuple(map(described, value))
        return value if _plain(value) else type(value).__qualname__

    return described(args), described(kwargs)


def _hidden(args: Any, kwargs: Any) -> Tensor:
    found = next(tensors(*args), None) if args else kwargs.get("hidden_states")
    if found is None:
        raise NotImplementedError("a block that is called without hidden states")
    return found


class _checkpointing:  # noqa: N801  (a context manager)
    """Checkpointing on or off in every block, without the generators' states, which no operator makes."""

    def __init__(self, model: nn.Module, reentrant: bool | None) -> None:
        self._flagged = [m for m in model.modules() if isinstance(getattr(m, "gradient_checkpointing", None), bool)]
        self._reentrant = reentrant

    def __enter__(self) -> None:
        self._before = [(m.gradient_checkpointing, vars(m).get("_gradient_checkpointing_func")) for m in self._flagged]

        def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
            own = {"use_reentrant": self._reentrant, "preserve_rng_state": False}
            return step.CHECKPOINT(function, *args, **{**kwargs, **own})

        for module in self._flagged:
            if not isinstance(module, Passed):
                module.gradient_checkpointing = self._reentrant is not None  # type: ignore[assignment]
                module._gradient_checkpointing_func = checkpoint  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        for module, (flag, function) in zip(self._flagged, self._before, strict=True):
            if not isinstance(module, Passed):
                module.gradient_checkpointing = flag
                if function is None:
                    vars(module).pop("_gradient_checkpointing_func", None)
                else:
                    module._gradient_checkpointing_func = function  # type: ignore[assignment]
