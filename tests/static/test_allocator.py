"""The rules of CUDA's caching allocator."""

import random

import pytest

from kbitcheck.observe.forecast.allocator import Allocator

KIB, MIB = 1 << 10, 1 << 20


def after(*sizes):
    allocator = Allocator()
    for key, size in enumerate(sizes):
        allocator.make(key, size)
    return allocator


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # one mebibyte is not worth a block of its own
        (13 * MIB + 1, 14 * MIB, 14 * MIB),
    ],
)
def test_sizes_are_rounded(size, allocated, reserved):
    allocator = after(size)
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_small_blocks_share_a_segment_and_large_ones_another():
    assert after(*[512 * KIB] * 4).reserved == 2 * MIB
    assert after(*[512 * KIB] * 5).reserved == 4 * MIB
    assert after(512 * KIB, 5 * MIB, 5 * MIB).reserved == 22 * MIB


def test_what_is_freed_is_used_again_and_neighbours_are_joined():
    allocator = after(*[5 * MIB] * 4)
    assert allocator.reserved == 20 * MIB
    for key in (0, 2, 1):
        allocator.free(key)
    allocator.make("larger", 15 * MIB)
    assert (allocator.reserved, allocator.allocated) == (20 * MIB, 20 * MIB)


def test_holes_are_not_joined_over_what_is_alive():
    allocator = after(*[5 * MIB] * 4)
    for key in (0, 2):
        allocator.free(key)
    allocator.make("larger", 10 * MIB)
    assert allocator.reserved == 30 * MIB


def test_a_device_without_room_gets_whole_segments_back_first():
    allocator = Allocator(limit=40 * MIB)
    allocator.make("first", 20 * MIB)
    allocator.free("first")
    allocator.make("second", 30 * MIB)
    assert (allocator.reserved, allocator.short) == (30 * MIB, 0)
    allocator.make("third", 12 * MIB)
    assert (allocator.short, allocator.peak_reserved) == (2 * MIB, 42 * MIB)


def test_nothing_is_lost_in_any_order():
    rng, allocator = random.Random(0), Allocator()
    alive: dict[int, int] = {}
    for key in range(3000):
        if alive and rng.random() < 0.5:
            allocator.free(alive.pop(rng.choice(list(alive))))
        else:
            allocator.make(key, rng.choice([100, 40 * KIB, 3 * MIB, 30 * MIB]) * rng.randint(1, 4))
            alive[key] = key
        assert 0 <= allocator.allocated <= allocator.reserved
        assert allocator.peak_allocated >= allocator.allocated
    for key in alive:
        allocator.free(key)
    assert allocator.allocated == 0
    # Everything is one free block for each segment again: the largest storage fits without another.
    before = allocator.reserved
    allocator.make("again", 100)
    assert allocator.reserved == before
