"""Which of many conditions a case looks at: all, one by its name, a share of a suite's, a few that are drawn, or none."""

import random
import re
from collections.abc import Iterable, Sequence

from kbitcheck.core.errors import NotApplicable, UsageError
from kbitcheck.core.suggest import did_you_mean

ALL, FEW = "all", "few"
PROCESSES = "processes"  # the case in processes of its own
TURNS, LATER = 3, 1  # cases take turns at what is dear, and this one is at the turn of later steps
FEWER = 9  # one of so many is a few


def share(conditions: str) -> tuple[int, int] | None:
    """The place of a case among so many of its suite; None where ``conditions`` are no share."""
    match = re.fullmatch(r"(\d+)/(\d+)", conditions)
    return (int(match[1]) - 1, int(match[2])) if match else None


def chosen(conditions: str, names: Iterable[str], *, entropy: str, seed: int) -> Sequence[str]:
    """Those of ``names`` that a case looks at. What a share has hangs on the seed alone, and a few on ``entropy``."""
    every = sorted(names)
    if conditions == ALL or conditions in every:
        return every if conditions == ALL else [conditions]
    if conditions == FEW:
        return sorted(random.Random(entropy).sample(every, -(-len(every) // FEWER)))  # noqa: S311
    if (place := share(conditions)) is None:
        raise UsageError(f"no such condition: {conditions!r}{did_you_mean(conditions, every)}")
    random.Random(seed).shuffle(every)  # noqa: S311
    return sorted(every[place[0] :: place[1]])


def require_processes(conditions: str) -> None:
    """Raise ``NotApplicable`` unless the case is to be run in processes of its own."""
    if conditions not in (ALL, PROCESSES):
        raise NotApplicable(f"dear: `kbitcheck impl --suite full` looks at this, and --conditions {PROCESSES}")


def has_turn(conditions: str, seed: int, turn: int, turns: int) -> bool:
    """Whether a case has this turn: in a suite that shares its conditions one of so many has."""
    place = share(conditions)
    return place is None or (place[0] + seed) % turns == turn


def require_turn(conditions: str, seed: int, turn: int, turns: int) -> None:
    """Raise ``NotApplicable`` where another case of the suite has this turn."""
    if not has_turn(conditions, seed, turn, turns):
        raise NotApplicable("another case of the suite looks at this: `--suite full` does in every case")
