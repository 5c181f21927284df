"""The three numbers that decide: whether training fits, what it costs, whether it trains. Each is the worst of all cases."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kbitcheck.compare.gate import breaches
from kbitcheck.core.report import Report
from kbitcheck.core.result import Status
from kbitcheck.core.rule import rules
from kbitcheck.report.parts.changes import BETTER, OTHER, WORSE, direction
from kbitcheck.report.parts.fit import changed, with_checkpointing
from kbitcheck.report.parts.limits import BRIEF, listed
from kbitcheck.report.parts.units import size

State = Literal["good", "bad", "warn", "unknown", "plain"]
MARKS: Mapping[State, str] = {"good": "✓", "bad": "✗", "warn": "!", "unknown": "?", "plain": ""}
GIB = 1 << 30
NO_STEPS = ("adapter",)  # commands that look at files alone
LEARNS = (
    "gradients",
    "drawn",
    "freezing",
    "watched",
    "loop",
    "batches",
    "optimizer",
)  # families of rules on what a step changes
SPENDS = ("cost", "checkpointing")
Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Number:
    """One of the three; ``value`` is a number with its unit, or that there is none, and ``details`` say of what."""

    title: str
    state: State
    value: str
    details: tuple[str, ...]

    @property
    def mark(self) -> str:
        """The state as a sign, for those who see no colours."""
        return MARKS[self.state]


def numbers(report: Report) -> list[Number]:
    """The three numbers, of a comparison how many changes; nothing for a command that looks at no step."""
    command = report.subject.get("command", "")
    if command in NO_STEPS:
        return []
    if report.gate is not None:
        return _changed(report)
    cases: Mapping[str, Facts] = report.facts.get("cases", {})
    forecasts = {case: facts["forecast"] for case, facts in cases.items() if facts.get("forecast")}
    return [_fits(forecasts, command), _costs(report, cases, forecasts), _trains(report, cases)]


def _changed(report: Report) -> list[Number]:
    """How many changes there are for the worse, for the better, and of other kinds."""
    of_way: dict[str, Counter[str]] = {way: Counter() for way in (WORSE, BETTER, OTHER)}
    for breach in breaches(report):
        of_way[direction(breach)][breach.kind] += 1
    states: Mapping[str, State] = {WORSE: "bad", BETTER: "good", OTHER: "warn"}
    return [
        Number(
            way.capitalize(),
            states[way] if kinds else "good" if way == WORSE else "plain",
            f"{kinds.total()} change{'s' * (kinds.total() != 1)}",
            (", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none",),
        )
        for way, kinds in of_way.items()
    ]


def _of(case: str, cases: Mapping[str, Any]) -> Iterator[str]:
    """Which of several cases a number is of."""
    if len(cases) > 1:
        yield f"worst of {len(cases)} cases: {case}"


def how_to_ask(command: str) -> str:
    """The option that makes a report forecast what fits."""
    if command in ("model", "audit"):
        return "`--memory 24GiB`, or a GPU's name, forecasts it"
    return "`kbitcheck model MODEL --memory 24GiB` forecasts it"


def _fits(forecasts: Mapping[str, Facts], command: str) -> Number:
    answers = {case: forecast["answer"] for case, forecast in forecasts.items() if forecast.get("answer")}
    if not answers:
        missing = next((f["missing"] for f in forecasts.values() if f.get("memory") and f.get("missing")), "")
        details = (f"no step was predicted: {missing}",) if missing else (how_to_ask(command),)
        return Number("Fits", "unknown", "not predicted" if missing else "no memory size asked for", details)
    case = max(answers, key=lambda c: (not answers[c]["fits"], answers[c]["requested"] / answers[c]["memory"]))
    answer, forecast = answers[case], forecasts[case]
    mode, memory = with_checkpointing(forecast["mode"]), f"{answer['memory'] / GIB:.4g} GiB"
    requested = f"{forecast['batch']:,} × {forecast['seq_len']:,} tokens {mode}"
    if answer["fits"]:
        most = f"at most {answer['batch']:,} × {answer['seq_len']:,}, or 1 × {answer['longest']:,}"
        holes = ("holes in the allocator's segments take it beyond",) * bool(answer["short"])
        value = f"{size(answer['requested'])} of {memory}"
        return Number("Fits", "warn" if holes else "good", value, (requested, most, *holes, *_of(case, answers)))
    instead = "nothing that was tried fits"
    if answer["change"]:
        instead = f"instead {changed(answer['change'])}, which fits"
    value = f"{size(answer['requested'] - answer['memory'])} too much for {memory}"
    return Number("Fits", "bad", value, (requested, instead, *_of(case, answers)))


def _costs(report: Report, cases: Mapping[str, Facts], forecasts: Mapping[str, Facts]) -> Number:
    state: State = "bad" if (broken := _broken(report, SPENDS)) else "plain"
    totals = {case: f["total"][f["mode"]] for case, f in forecasts.items() if f["total"].get(f["mode"])}
    if totals:
        case = max(totals, key=lambda c: totals[c])
        forecast = forecasts[case]
        shape = f"{forecast['batch']:,} × {forecast['seq_len']:,} tokens"
        step = f"at the peak of a step of {shape}, predicted for {forecast['device']}"
        if forecast["overhead"]:
            step += f"; beside it about {size(forecast['overhead'])} of the CUDA context"
        details = (*broken, step, *_preparing(cases[case]), *_of(case, totals))
        return Number("Costs", state, size(totals[case]), details)
    grown = {case: f for case, f in cases.items() if f.get("bytes_loaded") and "bytes_prepared" in f}
    if not grown:
        return Number("Costs", "unknown", "not measured", ("no case has come to a prepared model",))
    case = max(grown, key=lambda c: grown[c]["bytes_prepared"] / grown[c]["bytes_loaded"])
    facts = grown[case]
    held = [*broken, "weights, prepared", *_preparing(facts)]
    if "activations" in facts:
        shape = " × ".join(map(str, facts["batch"]))
        held.append(f"a step of {shape} tokens holds {size(facts.get('checkpointed', facts['activations']))}")
    return Number("Costs", state, size(facts["bytes_prepared"]), (*held, *_of(case, grown)))


def _preparing(facts: Facts) -> Iterator[str]:
    before, after = facts.get("bytes_loaded"), facts.get("bytes_prepared")
    if before and after is not None:
        yield f"preparing adds {size(after - before)} ({(after - before) / before:.0%})"


def _trains(report: Report, cases: Mapping[str, Facts]) -> Number:
    breaks = _broken(report, LEARNS)
    state: State = "bad" if breaks else "good"
    errors = {case: e for case, f in cases.items() if (e := f.get("gradient_errors", {})).get("layers")}
    if not errors:
        return _without_errors(report, state, breaks)
    shares = {case: max(_shares(e["error"], e["bound"])) for case, e in errors.items()}
    case = max(shares, key=lambda c: shares[c])
    details = [*breaks, "largest error of an adapter's gradient, by its bound"]
    facts = cases[case]
    if facts.get("adapters"):
        details.append(f"{facts['adapters'] - facts['dead_adapters']} of {facts['adapters']} adapter tensors learn")
    if "losses" in facts:
        details.append(f"a step's loss falls from {facts['losses'][0]:.3g} to {facts['losses'][-1]:.3g}")
    return Number("Trains", state, f"{shares[case]:.2g} of the bound", (*details, *_of(case, shares)))


def _broken(report: Report, families: Sequence[str]) -> tuple[str, ...]:
    """Which rules of these families are broken and count, in a phrase, if any."""
    codes = {r.rule for r in report.results if report.counts(r) and _family(r.rule) in families}
    return (f"broken: {listed(sorted(codes), BRIEF.cases)}",) if codes else ()


def _without_errors(report: Report, state: State, breaks: tuple[str, ...]) -> Number:
    """What there is to say where no gradient stands beside its twin's."""
    if report.no_gradients:
        return Number("Trains", "unknown", "not judged", (f"gradients: {report.no_gradients}",))
    kept = {r.rule for r in report.results if r.status is Status.PASS and _family(r.rule) in LEARNS}
    if not (kept or breaks):
        return Number("Trains", "unknown", "not judged", ("no rule on a training step was judged",))
    value = f"{len(kept)} rule{'s' * (len(kept) > 1)} on training steps kept" if not breaks else "not as it should"
    return Number("Trains", state, value, breaks)


def _family(code: str) -> str:
    return rules()[code].family if code in rules() else ""


def _shares(errors: Sequence[float], bounds: Sequence[float]) -> Iterator[float]:
    for error, bound in zip(errors, bounds, strict=True):
        yield error / bound if bound else 0.0
