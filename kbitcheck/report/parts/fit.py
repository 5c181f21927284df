"""Whether training fits, in one line, and where its bytes are, in small tables: rows of the memory table."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from kbitcheck.report.parts.units import size

GIB = 1 << 30
NOTABLE = 0.0005  # of the peak
FEW = 3  # places that are all named


def answer(forecast: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The line to act on, if a memory size was requested."""
    reply, memory = forecast.get("answer"), forecast.get("memory")
    if not reply:
        if memory and forecast.get("missing"):
            yield from _without_a_step(forecast, memory)
        return
    mode = with_checkpointing(forecast["mode"])
    memory = f"{reply['memory'] / GIB:.4g} GiB"
    if reply["fits"]:
        shape = f"{reply['batch']:,} × {reply['seq_len']:,} tokens"
        longest = f"; or 1 × {reply['longest']:,}" if reply["longest"] > reply["seq_len"] else ""
        whole = longest and reply["longest"] == forecast["limit"]
        most = f"{longest}{', the most that the model takes' if whole else ''}"
        yield "fits", f"{memory}: {shape} {mode}, {_gib(reply['needed'])}{most}"
        if reply["short"]:
            advice = "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or take fewer rows"
            yield (
                "",
                f"holes in the allocator's segments would take {_gib(reply['short'])} too much, as simulated: {advice}",
            )
        return
    shape = f"{reply['batch']:,} × {reply['seq_len']:,} tokens {mode}"
    yield (
        "too large",
        f"for {memory}: {shape} need {_gib(reply['needed'])}, {_gib(reply['needed'] - reply['memory'])} too much",
    )
    if reply["change"]:
        yield "instead", f"{changed(reply['change'])}, which fits"
    elif reply["least"]:
        yield "instead", f"nothing that was tried fits; the least: {changed(reply['least'])}"


def _without_a_step(forecast: Mapping[str, Any], memory: int) -> Iterator[tuple[str, str]]:
    """What stays through training, and whether that alone is too much."""
    stays = forecast["resident"] + forecast["overhead"]
    room, alone = f"{memory / GIB:.4g} GiB", f"{_gib(stays)} stay through training"
    if stays > memory:
        yield "too large", f"for {room}: {alone}, {_gib(stays - memory)} too much; no step was predicted"
    else:
        yield "fits", f"unknown for {room}: no step was predicted; {alone}"


def changed(change: Mapping[str, Any]) -> str:
    """Other options and what a device needs with them."""
    options = " ".join(change["options"])
    return f"{options}: {change['batch']:,} × {change['seq_len']:,} tokens need {_gib(change['needed'])}"


def with_checkpointing(mode: str) -> str:
    """A mode in words."""
    return "without checkpointing" if mode == "off" else f"with {mode} checkpointing"


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.3g} GiB"


def loading(forecast: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The peak while loading, where it is more than that of training, or more than there is room for."""
    peak = forecast.get("loading")
    if not peak:
        return
    total = forecast["total"].get(forecast["mode"], forecast["resident"])
    room = (forecast["memory"] or float("inf")) - forecast["overhead"]
    if peak["peak"] > total or peak["peak"] > room:
        at = f" at {peak['tensor']}" if peak["tensor"] else ""
        yield (
            "loading",
            f"takes {size(peak['peak'])}{at}, more than {'training' if peak['peak'] > total else 'there is'}: {peak['how']}",
        )


def parts(forecast: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is alive at the peak by kind, the largest first; all of it is the peak."""
    alive = forecast.get("parts") or ()
    kinds: dict[str, Counter[str]] = {}
    for part in alive:
        kinds.setdefault(part["kind"], Counter())[part["where"]] += part["nbytes"]
    total = sum(part["nbytes"] for part in alive)
    heading = "at the peak"
    for kind, places in sorted(kinds.items(), key=lambda item: -item[1].total()):
        if places.total() < NOTABLE * total:
            continue
        yield heading, f"{size(places.total()):>9} {places.total() / total:>4.0%}  {kind}{_places(places)}"
        heading = ""


def _places(places: Counter[str]) -> str:
    named = [(where, nbytes) for where, nbytes in places.most_common() if where]
    if not named:
        return ""
    if len(named) > FEW and sum(n for _, n in named[:FEW]) < sum(n for _, n in named) / 2:  # no few that matter most
        return f" (in {len(named)} blocks, at most {size(named[0][1])}: {named[0][0]})"
    return f" ({', '.join(f'{where} {size(nbytes)}' for where, nbytes in named[:FEW])})"


def gpus(forecast: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What each of several GPUs holds under each strategy."""
    shares = forecast.get("shares") or ()
    if not shares:
        return
    columns = ("weights", "adapters", "gradients", "optimizer", "activations", "extra")
    number = f"on each of {forecast['gpus']}"
    yield "GPUs", f"{number:13}{''.join(f'{name:>12}' for name in columns)}{'in all':>11}"
    for share in shares:
        total = sum(share[name] for name in columns)
        yield "", f"{share['strategy']:13}{''.join(f'{size(share[name]):>12}' for name in columns)}{size(total):>11}"
    notes: dict[str, list[str]] = {}
    for share in shares:
        loads = "each GPU holds the whole model while it is loaded" * share["loads_whole"]
        for note in (share["note"], loads, share.get("dtypes", "")):
            notes.setdefault(note, []).append(share["strategy"])
    yield from (("", f"{' and '.join(of)}: {note}") for note, of in notes.items() if note)
