"""One call of one block in a user's own step: recorded without a change to the graph, and compared with twins."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from transformers.activations import ReLUSquaredActivation

from kbitcheck import backends
from kbitcheck.core.errors import cause
from kbitcheck.core.facts import Gap, Part
from kbitcheck.core.profile import AS_LOADED
from kbitcheck.observe import internals
from kbitcheck.observe.blockwise.oracle import Twin, compare_alone
from kbitcheck.observe.blockwise.record import TENSOR, BlockCall, floating, parameter_names
from kbitcheck.observe.probes import kv_cache, switches
from kbitcheck.observe.probes.layers import Weights
from kbitcheck.observe.twin import low_rank, patches, twins
from kbitcheck.observe.watch import readers
from kbitcheck.observe.watch.guard import Guard
from kbitcheck.observe.watch.orthogonal import with_term

SMALL = 64 << 20  # bytes of a block's weights in float64, up to which its twins are kept
GATES = (nn.ReLU, ReLUSquaredActivation)  # each calls one ``relu``


@dataclass(slots=True)
class Recorded:
    """The first call of a block that a gradient came back through. ``gradients`` are its trained parameters', by name in the block.

    ``added`` is what the block itself added to the gradients of what it was passed, by index: less than all where others read it.
    ``inside`` is what the block itself added to the gradients of what it returned, by output. ``through`` are outputs that are
    what it was passed, by output the argument's index.
    ``bare`` are the tensors that the block returned, before other hooks saw them, each with the hook that catches its gradient, or None.
    ``why`` says what keeps the call from being compared; "" where nothing does.
    """

    call: BlockCall
    random: torch.Tensor
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    edges: dict[int, readers.Edge] = field(default_factory=dict)
    added: dict[int, torch.Tensor] = field(default_factory=dict)
    inside: dict[int, torch.Tensor] = field(default_factory=dict)
    through: dict[int, int] = field(default_factory=dict)
    bare: list[tuple[torch.Tensor, Any]] = field(default_factory=list)
    why: str = ""

    @property
    def complete(self) -> bool:
        """Whether a gradient entered the block."""
        return bool(self.call.entering)

    @property
    def own(self) -> tuple[int, ...]:
        """The arguments whose gradient comes from the block alone."""
        leaving, added = self.call.leaving, self.added
        shared = {i for i, g in leaving.items() if i not in added or not readers.alone(g, added[i])}
        return tuple(i for i in self.call.differentiable if i not in shared)

    @property
    def entering(self) -> dict[int, torch.Tensor]:
        """The gradients that entered from outside the block: a returned tensor that the block reads as well has others, too."""
        whole = self.call.entering
        inside = self.inside | {i: self.added[index] for i, index in self.through.items() if index in self.added}
        alone = {i for i, added in inside.items() if i in whole and readers.alone(whole[i], added)}
        return {i: g - inside[i] if i in inside else g for i, g in whole.items() if i not in alone}


class Recorder:
    """Hooks on one block, on what enters and leaves it, and on its parameters; all of them only look.

    ``part`` says what is kept of outputs and their gradients.
    """

    def __init__(
        self, name: str, block: nn.Module, guard: Guard, part: Callable[[torch.Tensor], torch.Tensor] = torch.clone
    ) -> None:
        self.name, self.block, self._guard, self.part = name, block, guard, part
        self.recorded: Recorded | None = None
        self._earlier: list[Recorded] = []  # of forwards whose backward had not come when the next batch did
        self._open: list[Recorded | None] = []
        self._handles: list[Any] = []
        self._closed = False
        self._passed: list[Any] = []  # what the block was passed, before other hooks saw it
        self._hold(block.register_forward_pre_hook(guard(self._takes), with_kwargs=True, prepend=True))
        self._hold(block.register_forward_pre_hook(guard(self._entered), with_kwargs=True))
        self._hold(block.register_forward_hook(guard(self._returned), prepend=True))
        self._hold(block.register_forward_hook(guard(self._left)))
        for each, parameter in block.named_parameters():
            if parameter.requires_grad:
                self._hold(parameter.register_hook(self._keeper(each)))
        for module in block.modules():
            if isinstance(module, GATES):
                self._hold(module.register_forward_hook(guard(self._gated)))

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: a copy of the model, hooks among it, is not looked at."""
        return self

    def _hold(self, handle: Any) -> None:
        self._handles.append(handle)

    @property
    def why(self) -> str:
        """What keeps the recorded call from being compared; "" where nothing does."""
        if self.recorded is None or not self.recorded.complete:
            return "no gradient came back through a block"
        if any(recorded.complete for recorded in self._earlier):
            return "one backward ran through several forwards of a block"
        return self.recorded.why

    @property
    def passed_on(self) -> bool:
        """Whether the block was passed something that has a gradient, and a gradient came back to what it returned."""
        recorded = self.recorded
        return recorded is not None and recorded.complete and bool(recorded.call.differentiable)

    @property
    def is_recast(self) -> bool:
        """Whether autocast computed a quantized layer in fewer bits than the layer's own compute dtype has."""
        cast = None if self.recorded is None else self.recorded.call.autocast
        layers = [] if cast is None else backends.quantized_layers(self.block)
        return any(backends.arithmetic(layer).compute_dtype(layer) == torch.float32 for _, layer in layers)

    def next_batch(self) -> None:
        """Keep what was recorded, where it is complete; otherwise begin again."""
        if self.recorded is not None and self.recorded.complete:
            self._closed = True
        elif self.recorded is not None:
            self.recorded.call.leaves, self.recorded.call.outputs = [], []
            self._earlier.append(self.recorded)
            self.recorded = None

    def remove(self) -> None:
        """Take everything off."""
        for handle in self._handles:
            handle.remove()

    def _takes(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._passed = internals.tree_flatten((args, kwargs))[0] if module is self.block else []

    def _bare(self, index: int, leaf: torch.Tensor) -> torch.Tensor:
        """What the block was passed in the place of a tensor with the same numbers: a hook that hands it on may change its gradient."""
        passed = self._passed[index] if index < len(self._passed) else None
        if not isinstance(passed, torch.Tensor) or not passed.requires_grad or passed.device != leaf.device:
            return leaf
        return passed if torch.equal(passed, leaf) else leaf

    def _entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not self.block:
            return
        self._open.append(None)
        if self._closed or not torch.is_grad_enabled():
            return
        if self.recorded is not None:
            if self.recorded.complete or not internals.backward_runs():
                self.recorded.why = "a block ran several times in one forward"
            return
        leaves, structure = internals.tree_flatten((args, kwargs))
        names = parameter_names(module, args, kwargs)
        kept: list[Any] = []
        for name, leaf in zip(names, leaves, strict=True):
            if name in kv_cache.ARGUMENTS and leaf is not None:
                leaf = _copied(leaf) if _filled(leaf) else None
            kept.append(leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf)
        differentiable = tuple(i for i, leaf in enumerate(leaves) if floating(leaf) and leaf.requires_grad)
        device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), torch.device("cpu"))
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        call = BlockCall(self.name, kept, names, structure, differentiable, device.type, autocast)
        recorded = Recorded(call, _random_state(device))
        for index in differentiable:
            leaf = self._bare(index, leaves[index])
            self._hold(leaf.register_hook(self._catcher(recorded, call.leaving, index)))
            recorded.edges[index] = readers.edge(leaf)
        self._passed = []
        self._open[-1] = recorded

    def _gated(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """Keep which gates of a ReLU are open: rounding moves those beside zero, and twins must not have others."""
        if self._open and self._open[-1] is not None:
            self._open[-1].call.choices.append(output.detach() > 0)

    def _returned(self, module: nn.Module, args: Any, output: Any) -> None:
        """Catch gradients before other hooks can change them, so that a change is one of the block's."""
        recorded = self._open[-1] if self._open and module is self.block else None
        if recorded is not None:
            leaves = filter(floating, internals.tree_flatten(output)[0])
            recorded.bare = [(leaf, self._catching(recorded, i, leaf)) for i, leaf in enumerate(leaves)]

    def _catching(self, recorded: Recorded, index: int, leaf: torch.Tensor) -> Any:
        """A hook that catches the gradient of a returned tensor; None where it has none."""
        return (
            leaf.register_hook(self._catcher(recorded, recorded.call.entering, index)) if leaf.requires_grad else None
        )

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        recorded = self._open.pop() if self._open and module is self.block else None
        if recorded is None:
            return
        leaves, recorded.call.returned_structure = internals.tree_flatten(output)
        for leaf in leaves:
            recorded.call.returned.append(TENSOR if floating(leaf) else leaf)
            if floating(leaf):
                self._catch(recorded, len(recorded.call.outputs), leaf)
                recorded.call.outputs.append(self.part(leaf.detach()))
                recorded.call.tracked.append(leaf.requires_grad)
        floats = [leaf for leaf in leaves if floating(leaf)]
        for handle in readers.sums(floats, recorded.edges, recorded.added, recorded.inside):
            self._hold(handle)
        passed = {place: index for index, place in recorded.edges.items()}
        places = {i: readers.edge(leaf) for i, leaf in enumerate(floats) if leaf.requires_grad}
        recorded.through = {i: passed[place] for i, place in places.items() if place in passed}
        recorded.edges.clear()
        recorded.bare.clear()
        self.recorded = recorded

    def _catch(self, recorded: Recorded, index: int, leaf: torch.Tensor) -> None:
        """Keep the hook that catches a returned tensor's gradient; another where a hook of the block returned something else."""
        bare, handle = recorded.bare[index] if index < len(recorded.bare) else (None, None)
        if bare is not leaf:
            if handle is not None:
                handle.remove()
            handle = self._catching(recorded, index, leaf)
        if handle is not None:
            self._hold(handle)

    def _catcher(self, recorded: Recorded, store: dict[int, torch.Tensor], key: int) -> Any:
        def catch(gradient: torch.Tensor | None) -> None:
            if gradient is None:  # an autograd function returned none
                return
            if key in store:
                recorded.why = "a backward ran through a block twice"
            whole = store is recorded.call.leaving
            store[key] = gradient.detach().clone() if whole else self.part(gradient.detach())

        return self._guard(catch)

    def _keeper(self, name: str) -> Any:
        def keep(gradient: torch.Tensor | None) -> None:
            if self.recorded is not None and not self._closed and gradient is not None:
                if name in self.recorded.gradients:
                    self.recorded.why = "a backward ran through a block twice"
                self.recorded.gradients[name] = gradient.detach().clone()

        return self._guard(keep)


class Twins:
    """Pairs of twins of blocks, each the float64 one and the one in the same dtypes. Small ones are kept for later steps."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, tuple[Twin, Twin]]] = {}

    def of(self, name: str, block: nn.Module) -> tuple[Twin, Twin]:
        """The twins of a block whose frozen parameters are those of the first forward, with the numbers that train as they are now."""
        trained = {n: p for n, p in block.named_parameters() if p.requires_grad}
        state = (tuple(trained), tuple(module.training for module in block.modules()))
        kept, pair = self._kept.get(name, (None, None))
        if pair is None or kept != state:
            weights = Weights(block)
            exact, rounded = twins.float64(block, weights), twins.same_dtype(block, weights, AS_LOADED)
            exact, rounded = (low_rank.define(patches.remove(twin, block)) for twin in (exact, rounded))
            pair = (_twin(patches.keep_float64(exact), torch.float64), _twin(rounded, None))
            if 8 * sum(math.prod(backends.recognition(m).shape(m)) for m in weights.layers.values()) < SMALL:
                self._kept[name] = state, pair
        for twin in pair:
            for each, buffer in twin.model.named_buffers():
                buffer.copy_(block.get_buffer(each))
            for each, parameter in twin.adapters.items():
                parameter.data.copy_(trained[each].detach())
        return pair


def compared(
    recorder: Recorder, pairs: Twins, regularized: frozenset[int] = frozenset()
) -> tuple[Part, dict[str, Gap]] | str:
    """The recorded call beside twins of its block with the weights that it has now; or why it cannot be compared.

    On ``regularized`` parameters, by id, the loss depends by a term of its own, too.
    """
    recorded, block = recorder.recorded, recorder.block
    if recorder.why or recorded is None:
        return recorder.why
    recorded.call.differentiable, recorded.call.entering = recorded.own, recorded.entering
    if recorded.call.device != "cpu" and _drops(block):
        return "masks of dropout cannot be drawn again in float64 on a GPU"

    names = {id(p): n for n, p in block.named_parameters() if p.requires_grad}
    gradients = {name: recorded.gradients.get(name) for name in names.values()}
    beyond = partial(with_term, {names[i]: block.get_parameter(names[i]) for i in names.keys() & regularized})
    try:
        return compare_alone(
            recorded.call, gradients, pairs.of(recorder.name, block), partial(around, recorded), beyond
        )
    except Exception as error:  # as of an adapter whose forward knows no float64
        return f"a twin of a block raised {cause(error)}"


@contextmanager
def around(recorded: Recorded, twin: Twin) -> Iterator[None]:
    """The context in which a twin runs the recorded call: with its random numbers, and caches of its own."""
    call = recorded.call
    caches = {i: leaf for i, leaf in enumerate(call.leaves) if leaf is not None and call.names[i] in kv_cache.ARGUMENTS}
    experts = internals.without_grouped_kernel() if twin.dtype else nullcontext()  # it knows no float64
    with switches.checkpointing_off(twin.model), _replaying_random(recorded.random, call.device), experts:
        for index, cache in caches.items():  # each twin adds its keys and values to a copy
            call.leaves[index] = _copied(cache)
        yield
    for index, cache in caches.items():
        call.leaves[index] = cache


def _twin(model: nn.Module, dtype: torch.dtype | None) -> Twin:
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Twin(model=model, adapters=adapters, dtype=dtype)


def _drops(block: nn.Module) -> bool:
    return any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in block.modules())


def _filled(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    return bool(length()) if callable(length) else True


def _copied(cache: Any) -> Any:
    """A cache of its own tensors, in the same dtypes; what a prefix gets as a gradient does not come back through it."""
    return copy.deepcopy(cache, {id(t): t.detach().clone() for t in kv_cache.cached_tensors(cache)})


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


@contextmanager
def _replaying_random(state: torch.Tensor, device: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        (torch.set_rng_state if device == "cpu" else torch.cuda.set_rng_state)(state)
        yield
