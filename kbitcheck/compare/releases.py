"""What changed from release to release: rows of a matrix that are the same library's, in the order of its versions."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from packaging.version import InvalidVersion, Version

from kbitcheck.compare.matrix import Mark, Row

ORDER = tuple(Mark)


@dataclass(frozen=True, slots=True)
class Step:
    """A rule whose mark differs between a release and the one before it; ``evidence`` is that of the release, if it breaks the rule."""

    before: str
    after: str
    rule: str
    was: Mark
    now: Mark
    evidence: str = ""

    @property
    def worse(self) -> bool:
        """Whether the release breaks what the one before kept, or breaks it more gravely."""
        return ORDER.index(self.now) > max(ORDER.index(self.was), ORDER.index(Mark.KEPT))

    @property
    def better(self) -> bool:
        """Whether the release keeps what the one before broke, or breaks it less gravely."""
        return self.now is not Mark.SKIPPED and ORDER.index(self.was) > max(
            ORDER.index(self.now), ORDER.index(Mark.KEPT)
        )


def steps(rows: Sequence[Row]) -> list[Step]:
    """Every change, the gravest first, of one gravity the newest release's first."""
    changed = [step for older, newer in releases(rows) for step in _between(older, newer)]
    return sorted(changed, key=lambda step: (not step.worse, -ORDER.index(step.now)))


def releases(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Each release that was judged, with the one before it; the newest first."""
    of_library: dict[tuple[str, str], list[tuple[Version, Row]]] = {}
    for row in rows:
        library, _, rest = row.subject.implementation.partition("==")
        version, _, function = rest.partition("::")
        with contextlib.suppress(InvalidVersion):  # of a requirement without one, too
            if row.marks:
                of_library.setdefault((library, function), []).append((Version(version), row))
    for members in of_library.values():
        newest_first = [row for _, row in sorted(members, key=lambda member: member[0], reverse=True)]
        yield from ((older, newer) for newer, older in pairwise(newest_first))


def _between(older: Row, newer: Row) -> Iterator[Step]:
    for rule in sorted(older.marks.keys() & newer.marks.keys()):
        was, now = older.marks[rule], newer.marks[rule]
        if was is not now:
            evidence = next(iter(newer.broken.get(rule, {}).values()), "")
            yield Step(older.subject.name, newer.subject.name, rule, was, now, evidence)
