"""Many names on one line: ``model.layers.{0..31}.mlp.{up,down}_proj.weight`` is easier to read than 64 lines."""

from collections.abc import Iterable, Sequence
from itertools import groupby

Parts = tuple[tuple[str, ...], ...]


def grouped(names: Iterable[str]) -> list[str]:
    """The names in fewer words: those that differ in one dotted part are merged, until none are.

    No name is lost and none is added: spelling out the braces gives the same set back. What holds spaces is prose, and
    is left as it is.
    """
    prose: list[str] = []
    dotted: dict[Parts, None] = {}
    for name in dict.fromkeys(names):
        if any(c.isspace() or c in "{},[]()" for c in name):
            prose.append(name)
        else:
            dotted[tuple((part,) for part in name.split("."))] = None
    return [".".join(map(_spelled, parts)) for parts in _merged(list(dotted))] + prose


def _merged(names: list[Parts]) -> list[Parts]:
    before = -1
    while len(names) != before:
        before = len(names)
        depth = max(map(len, names), default=0)
        # Numbers first: a run of layers is what repeats. Then from the end, where siblings differ.
        for numeric in (True, False):
            for position in reversed(range(depth)):
                names = _merge_at(names, position, numeric=numeric)
    return names


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
