"""The verdict line: the answer, the number of rules by outcome, and what the answer does not cover."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kbitcheck.core.causes import causes
from kbitcheck.core.memory_sizes import GIB
from kbitcheck.core.report import EXIT_BROKEN_RULE, EXIT_CONFORMS, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_NOTHING, Report
from kbitcheck.core.result import Level, Result, Status
from kbitcheck.report.parts.units import MOST, quantized_share

# Outcomes, worst first, with their words in the line.
OUTCOMES = {
    "broken": ("rule broken", "rules broken"),
    "not judged": ("could not be judged", "could not be judged"),
    "warning": ("warning", "warnings"),
    "kept": ("kept", "kept"),
    "not applicable": ("not applicable", "not applicable"),
}
WORST_FIRST = tuple(OUTCOMES)
READY = "✓ ready"
NOTHING = "✗ nothing was checked"
UNGROUNDED = "✓ nothing wrong in what could be looked at ({})"


def outcome(report: Report, result: Result) -> str:
    """Which of ``OUTCOMES`` a result is."""
    if result.status is Status.FAIL:
        return "broken" if report.counts(result) else "warning"
    return {Status.ERROR: "not judged", Status.PASS: "kept", Status.SKIP: "not applicable"}[result.status]


def verdict(report: Report) -> str:
    """The whole line. It counts rules, not results: a rule broken in five cases is one broken rule."""
    if report.gate is not None:
        kinds = Counter(b["kind"] for b in report.gate["breaches"] if b["counted"])
        others = sum(not b["counted"] for b in report.gate["breaches"])
        parts = [f"{number} {name}" for name, number in kinds.items()] + ([f"{others} not counted"] if others else [])
        return f"{answer(report)}: {', '.join(parts) or 'nothing changed'}"
    worst: dict[str, str] = {}
    for result in report.results:
        both = {worst.get(result.rule, WORST_FIRST[-1]), outcome(report, result)}
        worst[result.rule] = min(both, key=WORST_FIRST.index)
    numbers = Counter(worst.values())
    counts = [
        f"{numbers[name]} {one if numbers[name] == 1 else several}"
        for name, (one, several) in OUTCOMES.items()
        if numbers[name] or name == "kept"
    ]
    follow = [worst[effect] for effect in causes(report.results)].count("broken")
    if follow:
        counts[0] += f" ({follow} follow{'s' if follow == 1 else ''} from others)"
    if ignored := len(report.subject.get("ignored", {})):
        counts.append(f"{ignored} ignored")
    # Most warnings of a model's audit are about other uses of the preparation, and a reader cannot know which.
    warned = [r for r in report.results if r.status is Status.FAIL and r.level is not Level.INFO]
    harmless = bool(warned) and not any(r.level is Level.MUST and not r.finding for r in warned)
    follow_up = ["no warning keeps this model from training"] if harmless and answer(report) == READY else []
    return "; ".join([f"{answer(report)}: {', '.join(counts)}", *follow_up, *_not_covered(report), *_left_out(report)])


def answer(report: Report) -> str:
    """The answer in a few words, with its mark."""
    if report.gate is not None and report.exit_code in (EXIT_CONFORMS, EXIT_BROKEN_RULE):
        return f"{'✗ changed' if report.exit_code else '✓ not worse'} against {report.gate['against']}"
    model, watch = (report.subject.get("command") in names for names in (("model", "audit"), ("watch",)))
    # An audit that did not compute everything rules nothing out; it proves less than a whole one.
    static = any(facts.keys() & {"static", "left_out"} for facts in report.facts.get("cases", {}).values())
    sound = "✓ nothing rules it out" if static else READY if model else "✓ conforms"
    if watch:
        sound = "✓ trains as it should"
    if any(facts.get("adapter", {}).get("cannot_tell") for facts in report.facts.get("cases", {}).values()):
        sound = UNGROUNDED.format("numbers, shapes")
    if unfit := _unfit(report):
        sound = f"! does not fit {unfit}"
    if report.no_gradients and not static:
        sound = UNGROUNDED.format("steps, dtypes, flags" if watch else "dtypes, flags")
    some = any(result.status in (Status.PASS, Status.FAIL) for result in report.results)
    return {
        EXIT_CONFORMS: sound,
        EXIT_BROKEN_RULE: "✗ not ready"
        if model
        else "✗ does not train as it should"
        if watch
        else "✗ does not conform",
        EXIT_ERROR: "✗ could not be judged",
        EXIT_INTERRUPTED: "✗ interrupted",
        EXIT_NOTHING: "✗ gradients were not judged" if some else NOTHING,
    }[report.exit_code]


def _unfit(report: Report) -> str:
    """The memory that was asked for, if training does not fit it; empty if it does, if nobody asked, or if it cannot be told."""
    answers = [(facts.get("forecast") or {}).get("answer") for facts in report.facts.get("cases", {}).values()]
    return next((f"{answer['memory'] / GIB:.4g} GiB" for answer in answers if answer and not answer["fits"]), "")


def _not_covered(report: Report) -> list[str]:
    """What share of a model's weights is quantized, if most are not; what a watched run rests on; why no gradient was judged."""
    parts = []
    if report.subject.get("command") in ("model", "audit"):
        shares = [share for facts in report.facts.get("cases", {}).values() if (share := quantized_share(facts))]
        parts += [f"only {text}" for text in dict.fromkeys(s.text for s in shares if s.share < MOST)]
    if watched := [facts["watched"] for facts in report.facts.get("cases", {}).values() if "watched" in facts]:
        parts.append(_looked_at(watched))
    if report.no_gradients:
        parts.append(f"gradients were not judged: {report.no_gradients}")
    return parts


def _looked_at(watched: Sequence[Mapping[str, Any]]) -> str:
    """How many steps, and which blocks beside their twins, the verdict of a watched run rests on."""
    steps, blocks = max(each["steps"] for each in watched), {name for each in watched for name in each["blocks"]}
    beside = f" and {len(blocks)} block{'s' if len(blocks) > 1 else ''} beside float64 twins"
    return f"looked at {steps} step{'s' if steps > 1 else ''}{beside if blocks else ''}"


def _left_out(report: Report) -> list[str]:
    """Which facts were left out, the dearest first, and what would allow the dearest."""
    left: dict[str, str] = {}
    for facts in report.facts.get("cases", {}).values():
        left |= facts.get("left_out", {})
    if not left:
        return []
    return [f"left out: {', '.join(left)} ({next(iter(left.values()))})"]
