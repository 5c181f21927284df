"""Steps of usual batches and lengths beside one memory size: the cells of a map, each a predicted step of that very shape."""

from collections.abc import Iterator

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts.fit import CellFacts
from kbitcheck.observe.forecast import parts
from kbitcheck.observe.forecast.candidate import Candidate

BATCHES = (1, 2, 4, 8, 16)
LENGTHS = (512, 1024, 2048, 4096)
MOST = (len(BATCHES) + 1) * (len(LENGTHS) + 1)  # the requested shape may add a row and a column


def shapes(batch: int, length: int, limit: int) -> Iterator[tuple[int, int]]:
    """Usual shapes and the requested one; a model that takes fewer tokens gets halves of what it takes. The smallest come first."""
    usual = [n for n in LENGTHS if n <= limit]
    if len(usual) < 2:
        usual = [n for n in (limit >> 3, limit >> 2, limit >> 1, limit) if n]
    lengths, batches = sorted({*usual, length}), sorted({*BATCHES, batch})
    yield from sorted(((b, n) for b in batches for n in lengths), key=lambda shape: (shape[0] * shape[1], shape))


def cells(candidate: Candidate, spec: CaseSpec) -> tuple[CellFacts, ...]:
    """What the requested memory holds; shapes whose steps would take too long have no cell."""
    return tuple(_cells(candidate, spec))


def _cells(candidate: Candidate, spec: CaseSpec) -> Iterator[CellFacts]:
    forecast, search, memory = candidate.forecast, candidate.search(spec), spec.memory or 0
    simulated = forecast.device != "cpu" and spec.gpus == 1
    wanted = shapes(forecast.batch, forecast.seq_len, forecast.limit)
    for (batch, length, _), step in search.within_patience((b, n, forecast.mode) for b, n in wanted):
        needed, short = candidate.needed(spec, step.peak), 0
        if simulated and needed <= memory:
            limit = memory - forecast.overhead
            short = parts.allocated(forecast, candidate.facts, step, step.trace(), limit=limit).short
        yield CellFacts(batch=batch, seq_len=length, needed=needed, short=short)
