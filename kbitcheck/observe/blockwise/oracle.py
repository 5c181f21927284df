"""A recorded step against twins that take its inputs and gradients, one block at a time.

Local exactness and exact joints are end-to-end exactness by the chain rule, and errors do not grow with depth: a fault
of one part in a thousand in one block of many shows, which a twin of the whole model drowns.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from kbitcheck.core.facts import HALF, BlockwiseFacts, Gap, Part
from kbitcheck.observe.blockwise import noise
from kbitcheck.observe.blockwise.record import TENSOR, BlockCall, floating, outermost_blocks
from kbitcheck.observe.internals import tree_flatten, tree_unflatten
from kbitcheck.observe.probes import adapters, step, switches
from kbitcheck.observe.probes.choices import ImposeChoices, RecordChoices
from kbitcheck.observe.probes.gap import gap
from kbitcheck.observe.twin.twins import Pair, compute_dtypes, has_bits_of

Autocast = Callable[[], AbstractContextManager[Any]] | None
Within = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Twin:
    """A twin with its adapters. ``dtype`` is that of all its tensors; None where it computes as the model under test does."""

    model: nn.Module
    adapters: Mapping[str, nn.Parameter]
    dtype: torch.dtype | None = None
    autocast: Autocast = None

    def around(self, call: BlockCall) -> AbstractContextManager[Any]:
        """Autocast as it was in the model's block; a float64 twin has none."""
        return nullcontext() if self.dtype else call.around()

    def outside(self, calls: Sequence[BlockCall]) -> AbstractContextManager[Any]:
        """Autocast outside the blocks: as it was where the first began, which shows what a wrapper of the model switched on."""
        if self.dtype or not calls:
            return self.autocast() if self.autocast else nullcontext()
        return calls[0].around()


@dataclass(slots=True)
class _Replay:
    """One call of a block in a twin's pass.

    ``inputs`` (by leaf index; ``tracked`` require grad) and ``entering`` (by output position) are what the twin's outside hands to the block;
    ``outputs``, ``leaving`` and ``gradients``, those of adapters, are what the twin's block makes of the *recorded* inputs and gradients.
    """

    twin: Twin
    call: BlockCall
    player: _Player
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    tracked: list[int] = field(default_factory=list)
    entering: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: list[torch.Tensor] = field(default_factory=list)
    leaving: dict[int, torch.Tensor | None] = field(default_factory=dict)
    gradients: list[tuple[nn.Parameter, torch.Tensor]] = field(default_factory=list)
    moved: bool = False

    def run(self, entering: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        """The floating outputs of the twin's block on the recorded arguments, after a backward from ``entering``."""
        differentiable = sorted({*self.call.differentiable, *self.tracked})
        leaves, args, kwargs = self.call.arguments(self.inputs, differentiable)
        choices = ImposeChoices(self.call.choices)
        with torch.enable_grad(), choices if self.call.choices else nullcontext(), self.twin.around(self.call):
            # In a context of its own: transformers collects hidden states through context variables.
            output = contextvars.Context().run(self.player.block, *args, **kwargs)
        self.moved = choices.moved
        outputs = [leaf for leaf in tree_flatten(output)[0] if floating(leaf)]
        pairs = [(o, entering[i].to(o.dtype)) for i, o in enumerate(outputs) if i in entering and o.requires_grad]
        if pairs:
            with torch.autocast(self.call.device, enabled=False):  # the twin's forward may be running under it
                torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        self.outputs = [o.detach() for o in outputs]
        for parameter in self.player.trained:
            if parameter.grad is not None:
                self.gradients.append((parameter, parameter.grad))
                parameter.grad = None
        self.leaving = {i: _sum(self.leaving.get(i), leaves[i].grad) for i in differentiable}
        return outputs


def _sum(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    return one if other is None else other if one is None else one + other


class _Played(torch.autograd.Function):
    """Recorded outputs in forward; in backward the recorded gradients leave.

    Where no gradient entered the model's block, though the twin's outside has one, the twin's block takes it.
    """

    @staticmethod
    def forward(
        ctx: Any, replay: _Replay, like: Sequence[torch.Tensor], anchor: torch.Tensor, *inputs: torch.Tensor
    ) -> Any:
        ctx.replay, ctx.dtypes = replay, [x.dtype for x in inputs]
        ctx.set_materialize_grads(False)
        outputs = tuple(o.to(mine.dtype, copy=True) for o, mine in zip(replay.call.outputs, like, strict=True))
        ctx.mark_non_differentiable(*(o for o, mine in zip(outputs, like, strict=True) if not mine.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        replay: _Replay = ctx.replay
        replay.entering = {i: g.detach() for i, g in enumerate(gradients) if g is not None}
        cut = {i: g for i, g in replay.entering.items() if i not in replay.call.entering}
        if cut:
            replay.run(cut)
        leaving = [replay.call.leaving.get(i, replay.leaving[i]) for i in replay.tracked]
        cast = [g if g is None else g.to(dtype) for g, dtype in zip(leaving, ctx.dtypes, strict=True)]
        return None, None, None, *cast


class _Player:
    """Stands in for one block's forward, which is kept in ``block``: answers its calls from the record, in order."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block.forward
        self.trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        self.replays: list[_Replay] = []
        self.uncalled: list[torch.Tensor] = []  # first outputs of calls that the model did not make
        self._answered = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._answered == len(self.replays):
            output = self.block(*args, **kwargs)
            self.uncalled += [leaf.detach() for leaf in tree_flatten(output)[0] if floating(leaf)][:1]
            return output
        replay, self._answered = self.replays[self._answered], self._answered + 1
        call = replay.call
        leaves, _ = tree_flatten((args, kwargs))
        replay.tracked = [i for i, leaf in enumerate(leaves) if floating(leaf) and leaf.requires_grad]
        replay.inputs = {i: leaf.detach() for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        like = replay.run(call.entering)
        # Where a frozen embedding asks for no gradient, what follows the block must ask for one all the same.
        anchor = torch.zeros((), requires_grad=True)
        outputs = iter(_Played.apply(replay, like, anchor, *(leaves[i] for i in replay.tracked)))
        returned = [next(outputs) if leaf is TENSOR else leaf for leaf in call.returned]
        assert call.returned_structure is not None
        return tree_unflatten(returned, call.returned_structure)


@contextmanager
def _replaying(twin: Twin, calls: Sequence[BlockCall]) -> Iterator[tuple[list[_Replay], dict[str, _Player]]]:
    """The twin's blocks answer from the record while the context is open."""
    blocks = {name: twin.model.get_submodule(name) for name in outermost_blocks(twin.model)}
    players = {name: _Player(block) for name, block in blocks.items()}
    replays = [_Replay(twin, call, players[call.block]) for call in calls]
    for replay in replays:
        replay.player.replays.append(replay)
    with switches.attributes(*((block, "forward", players[name]) for name, block in blocks.items())):
        yield replays, players


class Comparison(NamedTuple):
    """A recorded step beside its twins, and the gradients of the twins' adapters."""

    facts: BlockwiseFacts
    twins: Pair


def compare(
    run: step.Step,
    calls: Sequence[BlockCall],
    twins: tuple[Twin, Twin],
    batch: step.Batch,
    seed: int,
    numbers: Mapping[str, torch.Tensor] | None = None,
) -> Comparison:
    """The recorded step beside its twins, the float64 one and the same-dtype one, whose blocks have the recorded names.

    ``numbers`` are those of the adapters in that step, where they are not the twins' own.
    """
    with ExitStack() as held:
        for twin in twins:
            held.enter_context(adapters.holding(twin.adapters, numbers or {}))
        exact, rounded = (_run(twin, calls, batch, seed) for twin in twins)
        return _compared(run, calls, twins, exact, rounded, partial(_within_pass, twins[1], calls, batch, seed))


def _compared(
    run: step.Step, calls: Sequence[BlockCall], twins: tuple[Twin, Twin], exact: _Pass, rounded: _Pass, within: Within
) -> Comparison:
    loss = torch.tensor(run.facts.loss, dtype=torch.float64)
    parts = {"": Part(block="", kind="", gaps={"loss": gap(loss, exact.loss.cpu(), rounded.loss.cpu().double())})}
    kinds = {name: type(twins[0].model.get_submodule(name)).__name__ for name in exact.uncalled}
    own = Pair(exact.gradients, rounded.gradients).beside(run.gradients)
    same_bits = has_bits_of(twins[1].model)
    times: dict[str, int] = {}
    for call, *replays in zip(calls, exact.replays, rounded.replays, strict=True):
        times[call.block] = times.get(call.block, 0) + 1
        label = call.block if times[call.block] == 1 else f"{call.block} (call {times[call.block]})"
        alone = sum(each.block == call.block for each in calls) == 1
        of_block = {n: own[n] for n in own if alone and _within_block(n, call.block)}
        gaps, changed = _drawn_again(call, (replays[0], replays[1]), of_block, None if same_bits else twins[1], within)
        parts[label] = Part(block=call.block, kind=kinds[call.block], gaps=gaps)
        own |= changed
    for name, outputs in exact.uncalled.items():
        for output, beside in zip(outputs, rounded.uncalled[name], strict=True):
            missing = {"output": gap(None, output, beside)}
            parts[f"{name} (a call that was left out)"] = Part(block=name, kind=kinds[name], gaps=missing)
    half = {id(c) for c in calls if any(str(o.dtype).removeprefix("torch.") in HALF for o in c.outputs)}
    moved = any(replay.moved for replay in exact.replays if id(replay.call) in half)
    facts = BlockwiseFacts(parts=parts, adapters=own, moved=moved, other_kernels=not same_bits)
    return Comparison(facts, Pair(exact.gradients, rounded.gradients))


@contextmanager
def _within_pass(twin: Twin, calls: Sequence[BlockCall], batch: step.Batch, seed: int) -> Iterator[None]:
    """As a pass of the twin runs."""
    with switches.seeded(seed, batch), switches.plain(twin.model), twin.outside(calls):
        yield


def _within_block(parameter: str, block: str) -> bool:
    return f".{block}." in f".{parameter}"


def _drawn_again(
    call: BlockCall, replays: tuple[_Replay, _Replay], own: Mapping[str, Gap], rounded: Twin | None, within: Within
) -> tuple[dict[str, Gap], dict[str, Gap]]:
    """The gaps of one call and of the adapters in it; yardsticks of what is off by chance are drawn again.

    A model whose kernels are the twin's rounds as the twin does: no chance there, and no ``rounded`` twin to draw with.
    """
    exact, beside = replays
    gaps = _gaps(call, exact, beside)
    if rounded is None:
        return gaps, dict(own)
    names = {id(parameter): name for name, parameter in rounded.adapters.items()}
    right = {id(parameter): gradient for parameter, gradient in exact.gradients}
    place = {name: id(parameter) for name, parameter in exact.twin.adapters.items()}

    def draw(number: int) -> dict[str, Gap]:
        dtypes = [*compute_dtypes(rounded.model), *filter(None, [call.autocast])]
        other = noise.moved(call, dtypes, number)
        replay = _Replay(rounded, other, beside.player, inputs=beside.inputs, tracked=beside.tracked)
        with within():
            replay.run(other.entering)
        leaving = {i: g for i, g in replay.leaving.items() if g is not None}
        made = _made(_gaps(replace(call, outputs=replay.outputs, leaving=leaving), exact, beside))
        gradients, once = ({names[id(p)]: g for p, g in each.gradients if id(p) in names} for each in (replay, beside))
        return made | {n: gap(g, right.get(place[n]), once.get(n)) for n, g in gradients.items()}

    again = noise.drawn_again({**gaps, **own}, draw)
    return {n: again[n] for n in gaps}, {n: again[n] for n in own}


def compare_alone(
    call: BlockCall,
    gradients: step.Gradients,
    twins: tuple[Twin, Twin],
    around: Callable[[Twin], Any],
    beyond: Callable[[step.Gradients, Pair], Pair] = lambda gradients, pair: pair,
) -> tuple[Part, dict[str, Gap]]:
    """One recorded call beside twins of its block alone, the float64 one and the same-dtype one: what leaves it.

    ``gradients`` are those that the call gave the block's own adapters, by name. ``around`` makes the context that a twin runs in;
    ``beyond`` adds to the twins' gradients what reaches adapters past the block.
    """
    replays, trained = [], []
    chosen = call.choices
    # The float64 twin runs last: it takes the experts that the other, which rounds as the model does, picked.
    for twin in reversed(twins):
        tensors = {i: leaf for i, leaf in enumerate(call.leaves) if isinstance(leaf, torch.Tensor)}
        like = {i: t.to(twin.dtype) if twin.dtype and floating(t) else t for i, t in tensors.items()}
        replay = _Replay(twin, call, _Player(twin.model), inputs=like)
        with around(twin), RecordChoices() as choices:
            replay.run(call.entering)
        call.choices = [*chosen, *choices.indices]
        of = {id(parameter): gradient for parameter, gradient in replay.gradients}
        trained.append({name: of.get(id(parameter)) for name, parameter in twin.adapters.items()})
        replays.append(replay)
    rounded, exact = replays
    adapters = beyond(gradients, Pair(*reversed(trained))).beside(gradients)
    again = None if has_bits_of(twins[1].model) else twins[1]
    gaps, adapters = _drawn_again(call, (exact, rounded), adapters, again, partial(around, twins[1]))
    return Part(block=call.block, kind=type(twins[0].model).__name__, gaps=_made(gaps)), adapters


class _Pass(NamedTuple):
    loss: torch.Tensor
    replays: list[_Replay]
    gradients: step.Gradients
    uncalled: Mapping[str, list[torch.Tensor]]  # by block


def _run(twin: Twin, calls: Sequence[BlockCall], batch: step.Batch, seed: int) -> _Pass:
    """A step of the twin in which every block replays, and runs by itself on what was recorded."""
    step.clear_gradients(twin.model)
    twin.model.train()
    with (
        _replaying(twin, calls) as (replays, players),
        switches.seeded(seed, batch),
        switches.plain(twin.model),
    ):
        with twin.outside(calls):
            _, loss = step.forward(twin.model, batch)
        if loss.requires_grad:
            loss.backward()
    for replay in reversed(replays):  # as a backward adds them
        for parameter, gradient in replay.gradients:
            parameter.grad = _sum(parameter.grad, gradient)
    gradients = {n: p.grad for n, p in twin.adapters.items()}
    step.clear_gradients(twin.model)
    return _Pass(loss.detach(), replays, gradients, {name: player.uncalled for name, player in players.items()})


def _made(gaps: Mapping[str, Gap]) -> dict[str, Gap]:
    """Of those of a call: what the block makes, and not what enters it."""
    return {name: each for name, each in gaps.items() if name.startswith(("output", "gradient that leaves"))}


def _gaps(call: BlockCall, exact: _Replay, rounded: _Replay) -> dict[str, Gap]:
    """What entered and left one call, forward and backward; all that entered one that the twin does not make is off."""
    gaps = {}
    for i, name in enumerate(call.names):
        if isinstance(call.leaves[i], torch.Tensor):
            gaps[name] = gap(call.leaves[i], exact.inputs.get(i), rounded.inputs.get(i))
        if i in exact.leaving:
            leaving = gap(call.leaving.get(i), exact.leaving[i], rounded.leaving.get(i))
            gaps[f"gradient that leaves {name}"] = leaving
    for i, (output, right, beside) in enumerate(zip(call.outputs, exact.outputs, rounded.outputs, strict=False)):
        name = f"output {i}" if i else "output"
        gaps[name] = gap(output, right, beside)
        if i in call.entering or i in exact.entering:
            entering = gap(call.entering.get(i), exact.entering.get(i), rounded.entering.get(i))
            gaps[f"gradient that enters {name}"] = entering
    return gaps
