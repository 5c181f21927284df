"""What CUDA's caching allocator takes from the device for storages that are made and freed in a given order.

The rules are those of torch's c10/cuda/CUDACachingAllocator.cpp with its default settings: sizes are rounded up to 512
bytes; up to 1 MiB a block is cut from a segment of 2 MiB, up to 10 MiB from one of 20 MiB, and larger ones get a segment
rounded up to 2 MiB; a free block is taken where the smallest that is large enough is, and split unless less than 512 bytes
(small) or 1 MiB (large) would be left; neighbours in a segment that are free become one block. Segments that are free as
a whole go back when the device has no room for another one.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

SMALL = 1 << 20
ROUND = 512


@dataclass(slots=True, eq=False)
class _Block:
    """Bytes of a segment, between its neighbours."""

    size: int
    small: bool
    before: "_Block | None" = None
    after: "_Block | None" = None
    free: bool = False
    order: int = 0

    def __lt__(self, other: "_Block") -> bool:
        return (self.size, self.order) < (other.size, other.order)


@dataclass(slots=True)
class Allocator:
    """Bytes ``allocated`` to storages as rounded, and ``reserved`` from the device, now and at the most.

    ``limit`` is what the device has, None for all that it takes; ``short`` is how much it would have had to have more.
    """

    limit: int | None = None
    allocated: int = 0
    reserved: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    short: int = 0
    _free: dict[bool, list[_Block]] = field(default_factory=lambda: {True: [], False: []})
    _blocks: dict[object, _Block] = field(default_factory=dict)
    _count: int = 0

    def make(self, key: object, nbytes: int) -> None:
        """A storage is made, which ``key`` stands for until it is freed."""
        size = max(-(-nbytes // ROUND), 1) * ROUND
        block = self._block(size)
        rest = block.size - size
        if rest >= ROUND if block.small else rest > SMALL:
            left = self._new(rest, small=block.small)
            left.before, left.after, block.after, block.size = block, block.after, left, size
            if left.after is not None:
                left.after.before = left
            self._release(left)
        self._blocks[key] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, key: object) -> None:
        """The storage is freed."""
        block = self._blocks.pop(key)
        self.allocated -= block.size
        if block.before is not None and block.before.free:
            self._take(block.before)
            block.size += block.before.size
            block.before = block.before.before
            if block.before is not None:
                block.before.after = block
        if block.after is not None and block.after.free:
            self._take(block.after)
            block.size += block.after.size
            block.after = block.after.after
            if block.after is not None:
                block.after.before = block
        self._release(block)

    def play(self, sizes: Iterable[int]) -> None:
        """Storages of these sizes are made, and stay."""
        for nbytes in sizes:
            self._count += 1
            self.make(("stays", self._count), nbytes)

    def _block(self, size: int) -> _Block:
        small = size <= SMALL
        free = self._free[small]
        place = bisect_left(free, _Block(size, small))
        if place < len(free):
            block = free.pop(place)
            block.free = False
            return block
        segment = 2 * SMALL if small else 20 * SMALL if size < 10 * SMALL else -(-size // (2 * SMALL)) * 2 * SMALL
        if self.limit is not None and self.reserved + segment > self.limit:
            self._return_segments()
            self.short = max(self.short, self.reserved + segment - self.limit)
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return self._new(segment, small=small)

    def _new(self, size: int, *, small: bool) -> _Block:
        self._count += 1
        return _Block(size, small, order=self._count)

    def _release(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.small], block)

    def _return_segments(self) -> None:
        for small, blocks in self._free.items():
            whole = [block for block in blocks if block.before is None and block.after is None]
            self.reserved -= sum(block.size for block in whole)
            self._free[small] = [block for block in blocks if block.before is not None or block.after is not None]

    def _take(self, block: _Block) -> None:
        free = self._free[block.small]
        del free[bisect_left(free, block)]
        block.free = False
