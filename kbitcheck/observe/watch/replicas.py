"""What one of several processes holds of what trains, before each step. No other process is waited for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kbitcheck.core.facts import Replica
from kbitcheck.observe import internals
from kbitcheck.observe.probes import digest

Place = tuple[int, tuple[int, ...]]  # the rank of this process, and the ranks that it trains with


def place_of(wrap: DistributedDataParallel | None) -> Place | None:
    """The rank of this process and those of its wrap, or of all without one; None where it trains alone."""
    if not internals.is_distributed():
        return None
    group = dist.group.WORLD if wrap is None else wrap.process_group
    return dist.get_rank(), tuple(dist.get_process_group_ranks(group))


def wrap_of(model: nn.Module) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` that a model is wrapped in, or holds."""
    return next((each for each in model.modules() if isinstance(each, DistributedDataParallel)), None)


class Replicas:
    """Digests of what ``trained`` gives, parameters by name, whose gradients ``wrap`` averages."""

    def __init__(
        self,
        trained: Callable[[], Mapping[str, nn.Parameter]],
        wrap: DistributedDataParallel | None,
        place: Callable[[DistributedDataParallel | None], Place | None] = place_of,
    ) -> None:
        self._trained, self._wrap, self._place_of = trained, wrap, place
        self._steps: list[Mapping[str, str]] = []
        self._place: Place | None = None
        self._whole: dict[str, int] = {}  # ids of parameters
        self._parts: set[str] = set()

    def look(self, taken: Sequence[object]) -> None:
        """A forward begins, and so many steps were taken before it: the first one after each is looked at."""
        if len(self._steps) != len(taken):
            return
        self._place = self._place or self._place_of(self._wrap)
        if self._place is None:
            return
        trained = self._trained()
        whole = {n: p for n, p in trained.items() if internals.local(p) is p and p.numel()}
        self._parts |= trained.keys() - whole
        self._whole |= {name: id(p) for name, p in whole.items()}
        self._steps.append({name: digest.bits(p) for name, p in whole.items()})

    @property
    def facts(self) -> Replica | None:
        """None where this process trains alone, or no forward was seen."""
        if self._place is None:
            return None
        rank, peers = self._place
        averaged = set() if self._wrap is None else internals.averaged(self._wrap)
        return Replica(
            rank=rank,
            peers=peers,
            steps=tuple(self._steps),
            wrapped=self._wrap is not None,
            leaves_out=frozenset(name for name, key in self._whole.items() if self._wrap and key not in averaged),
            sharded=len(self._parts),
        )
