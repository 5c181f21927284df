"""Many names on one line: ``model.layers.{0..31}.mlp.{up,down}_proj.weight`` is easier to read than 64 lines."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

PROSE = re.compile(r"[\s{},\[\]()]")
Parts = tuple[tuple[str, ...], ...]


def grouped(names: Iterable[str]) -> list[str]:
    """The names in fewer words: those that differ in one dotted part are merged, until none are.

    No name is lost and none is added: spelling out the braces gives the same set back. What holds spaces is prose, and
    is left as it is.
    """
    distinct = list(dict.fromkeys(names))
    prose = [name for name in distinct if PROSE.search(name)]
    dotted: list[Parts] = [tuple((p,) for p in name.split(".")) for name in distinct if not PROSE.search(name)]
    return [".".join(map(_spelled, parts)) for parts in _merged(dotted)] + prose


def _merged(names: list[Parts]) -> list[Parts]:
    merged = names
    # Numbers first: a run of layers is what repeats. Then from the end, where siblings differ.
    for numeric in (True, False):
        for position in reversed(range(max(map(len, names), default=0))):
            merged = _merge_at(merged, position, numeric=numeric)
    return merged if len(merged) == len(names) else _merged(merged)


def _merge_at(names: Sequence[Parts], position: int, *, numeric: bool) -> list[Parts]:
    groups: dict[tuple[object, ...], list[Parts]] = {}
    for index, parts in enumerate(names):
        fits = position < len(parts) and all(p.isdecimal() for p in parts[position]) == numeric
        key = (parts[:position], parts[position + 1 :]) if fits else (index,)
        groups.setdefault(key, []).append(parts)
    merged = []
    for group in groups.values():
        first = group[0]
        if len(group) > 1:
            union = tuple(dict.fromkeys(p for parts in group for p in parts[position]))
            first = (*first[:position], union, *first[position + 1 :])
        merged.append(first)
    return merged


def _spelled(parts: tuple[str, ...]) -> str:
    if len(parts) == 1:
        return parts[0]
    if all(p.isdecimal() and str(int(p)) == p for p in parts):
        return "{" + ",".join(_ranges(sorted(map(int, parts)))) + "}"
    # A common ending stays outside: {up,down}_proj.
    endings = {p[p.index("_", 1) :] if "_" in p[1:] else "" for p in parts}
    ending = endings.pop() if len(endings) == 1 else ""
    return "{" + ",".join(p.removesuffix(ending) for p in parts) + "}" + ending


def _ranges(numbers: Sequence[int]) -> list[str]:
    # Within a run, numbers and their positions grow alike.
    groups = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return [text for run in runs for text in ([f"{run[0]}..{run[-1]}"] if len(run) > 2 else map(str, run))]
