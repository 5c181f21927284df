"""The storages of a training step in the order in which they are made and freed, as a device's allocator sees them.

Of blocks that compute the same one runs; here each of the others gets storages of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal

Kind = Literal["activations", "logits and loss", "gradients", "workspace"]
Where = Literal["enter", "leave", "turn", "back"]


@dataclass(frozen=True, slots=True)
class Mark:
    """The step comes to a block, in its forward or backward, leaves it, or turns; ``position`` is the events before.

    ``like`` is the block that ran in the place of this one.
    """

    position: int
    where: Where
    block: str = ""
    like: str = ""


@dataclass(slots=True)
class Log:
    """What a step makes and frees: a storage's number among ``nbytes``, or its complement when it is freed.

    ``forward`` says of each storage whether a forward made it, also one that recomputes a block. Those that are freed while
    the log is ``dropping`` are ``dropped``: every block's are, at the end of a forward.
    """

    nbytes: list[int] = field(default_factory=list)
    forward: list[bool] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    in_forward: bool = True
    dropping: bool = False
    dropped: set[int] = field(default_factory=set)
    _alive: dict[int, int] = field(default_factory=dict)

    def make(self, key: int, nbytes: int) -> None:
        """A storage is made, whose identity is ``key`` until it is freed."""
        self._alive[key] = len(self.nbytes)
        self.events.append(len(self.nbytes))
        self.nbytes.append(nbytes)
        self.forward.append(self.in_forward)

    def free(self, key: int) -> None:
        """A storage is freed; of others than those made here nothing is noted."""
        if key in self._alive:
            number = self._alive.pop(key)
            self.events.append(~number)
            if self.dropping:
                self.dropped.add(number)

    def scratch(self, nbytes: int) -> None:
        """A storage lives as long as one kernel."""
        self.events += [len(self.nbytes), ~len(self.nbytes)]
        self.nbytes.append(nbytes)
        self.forward.append(self.in_forward)

    def close(self) -> None:
        """Nothing more is noted: the step is over."""
        self._alive.clear()

    def number(self, key: int) -> int | None:
        """The number of the storage with this identity, if it is alive and was made here."""
        return self._alive.get(key)

    def mark(self, where: Where, block: str = "", like: str = "") -> None:
        """The step comes to a mark."""
        self.marks.append(Mark(len(self.events), where, block, like or block))


@dataclass(slots=True)
class Segment:
    """The events from one mark to the next: of the forward or backward of ``block``, or beside the blocks.

    ``like`` is the block that ran; ``within`` is how many events came before the block was left.
    """

    block: str
    like: str
    backward: bool
    events: Sequence[int] = ()
    within: int = 0


@dataclass(frozen=True, slots=True)
class Storage:
    """One storage of a step: its bytes, what it holds, and the block that made it ("" beside the blocks)."""

    nbytes: int
    kind: Kind
    block: str


@dataclass(frozen=True)
class Trace:
    """A step of the whole model: its storages, and events as in ``Log``.

    ``turn`` is how many events came before the backward, ``left`` before the forward left each block.
    """

    storages: Sequence[Storage]
    events: Sequence[int]
    turn: int = 0
    left: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def places(self) -> list[int]:
        """Bytes alive after each event."""
        return list(accumulate(self.storages[e].nbytes if e >= 0 else -self.storages[~e].nbytes for e in self.events))

    @property
    def peak(self) -> int:
        """The most bytes alive."""
        return max(self.places, default=0)

    def at_peak(self) -> list[Storage]:
        """The storages alive at the peak, in the order in which they were made."""
        alive: dict[int, Storage] = {}
        for event in self.events[: self.places.index(self.peak) + 1] if self.events else ():
            if event >= 0:
                alive[event] = self.storages[event]
            else:
                del alive[~event]
        return list(alive.values())


def segments(log: Log) -> list[Segment]:
    """The segments of a step in order; a block that did not run has the events of the one that it is like."""
    parts = [Segment("", "", backward=False)]
    start, left = 0, None
    for mark in (*log.marks, Mark(len(log.events), "turn")):
        if mark.where == "leave":
            left = mark.position
            continue
        last = parts[-1]
        last.events = log.events[start : mark.position]
        if last.block:
            last.within = (mark.position if left is None else left) - start
        start, left = mark.position, None
        parts.append(Segment(mark.block, mark.like, backward=last.backward or mark.where != "enter"))
    del parts[-1]
    ran = {(part.block, part.backward): part for part in parts if part.block == part.like}
    for part in parts:
        if part.block != part.like:
            model = ran[part.like, part.backward]
            part.events, part.within = model.events, model.within
    return parts


def whole(log: Log, *, gradients: frozenset[int], logits: int) -> Trace:
    """The step of the whole model; ``gradients`` are the numbers of the adapters' gradients, ``logits`` their bytes.

    It is empty where a block that did not run is like one whose pass was not seen.
    """
    ran = {(mark.block, mark.where) for mark in log.marks if mark.block == mark.like}
    if any((mark.like, mark.where) not in ran for mark in log.marks if mark.block != mark.like):
        return Trace((), ())
    return _Expansion(log, gradients, logits).trace()


class _Expansion:
    """Plays the segments of a step, and numbers the storages of blocks that did not run.

    Blocks hand on storages: the one of a block's output is freed in the backward of the next, that of a gradient in the
    block before. Which of the others' storages such a block frees is inferred from the one that it is like.
    """

    def __init__(self, log: Log, gradients: frozenset[int], logits: int) -> None:
        self._log, self._gradients, self._logits = log, gradients, logits
        self._parts = parts = segments(log)
        self._ran = [i for i, part in enumerate(parts) if part.block == part.like]
        at = {(parts[i].block, parts[i].backward): i for i in self._ran}
        self._model = [at[part.like, part.backward] for part in parts]
        for i in self._ran:  # of a block that runs several times, each run is its own
            self._model[i] = i
        self._made_in = {e: i for i in self._ran for e in parts[i].events if e >= 0}
        self._freed_in = {~e: i for i in self._ran for e in parts[i].events if e < 0}
        self._forward_of = {part.block: i for i, part in enumerate(parts) if part.block and not part.backward}
        self._storages: list[Storage] = []
        self._events: list[int] = []
        self._alive: dict[tuple[int, int], int] = {}  # by segment and number in the log
        self._turn, self._left = 0, dict[str, int]()

    def trace(self) -> Trace:
        for place, part in enumerate(self._parts):
            for order, event in enumerate(part.events):
                if event >= 0:
                    self._alive[place, event] = len(self._storages)
                    self._events.append(len(self._storages))
                    self._storages.append(self._storage(part, place, event, within=order < part.within))
                elif ~event in self._log.dropped:
                    alive = sorted(key for key in self._alive if key[1] in self._log.dropped)
                    self._events += [~self._alive.pop(key) for key in alive]
                elif (number := self._taken(place, ~event)) is not None:
                    self._events.append(~number)
                if order + 1 == part.within and not part.backward:
                    self._left[part.block] = len(self._events)
            if not part.backward:
                self._turn = len(self._events)
        return Trace(self._storages, self._events, self._turn, self._left)

    def _storage(self, part: Segment, place: int, number: int, *, within: bool) -> Storage:
        nbytes, block = self._log.nbytes[number], part.block if within else ""
        kind: Kind = "activations"
        if number in self._gradients:
            kind = "gradients"
        elif not block and 2 * nbytes >= self._logits:  # in half precision they take half as much
            kind = "logits and loss"
        elif not self._log.forward[number] or self._temporary(number, place):
            kind = "workspace"
        return Storage(nbytes, kind, block)

    def _temporary(self, number: int, place: int) -> bool:
        """True for what the forward of a block makes and frees itself, while it is not recomputed."""
        return not self._parts[place].backward and self._freed_in.get(number) == self._model[place]

    def _taken(self, place: int, number: int) -> int | None:
        """The storage that is freed where the log frees ``number`` in the segment at ``place``; None for another's."""
        model, maker = self._model[place], self._made_in[number]
        if maker == model:
            return self._alive.pop((place, number), None)
        block = self._parts[model].block
        if block and self._parts[maker].block == block:
            return self._alive.pop((self._forward_of[self._parts[place].block], number), None)
        backward = self._parts[maker].backward
        if maker == self._before(model, self._ran, backward=backward):
            before = self._before(place, range(len(self._parts)), backward=backward)
            handed_on = self._handed_on(before, number)
            if handed_on is not None:
                return self._alive.pop((before, handed_on))
        return self._alive.pop((maker, number), None) if place == model else None

    def _before(self, place: int, among: Sequence[int], *, backward: bool) -> int:
        """The segment whose results the one at ``place`` reads: the last forward, or backward, before its own."""
        part = self._parts[place]
        own = place if part.backward == backward else self._forward_of.get(part.block, 0)
        return max((i for i in among if i < own and self._parts[i].backward == backward), default=-1)

    def _handed_on(self, maker: int, number: int) -> int | None:
        """The number by which the segment ``maker`` made the storage that stands where ``number`` does."""
        model = self._model[maker]
        if self._made_in[number] == model and (maker, number) in self._alive:
            return number
        block, nbytes = self._parts[model].block, self._log.nbytes[number]
        for event in self._parts[model].events:
            freed_in = self._freed_in.get(event)
            if event < 0 or freed_in is None or self._parts[freed_in].block == block:
                continue
            if self._log.nbytes[event] == nbytes and (maker, event) in self._alive:
                return event
        return None
