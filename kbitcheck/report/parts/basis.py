"""What a verdict rests on, in a few words: how much was judged, beside what, and what was predicted only."""

from collections.abc import Iterator, Mapping
from typing import Any

from kbitcheck.core.report import Report
from kbitcheck.core.result import Status


def basis(report: Report) -> list[str]:
    """Phrases, the broadest first."""
    return list(_phrases(report, report.facts.get("cases", {})))


def _phrases(report: Report, cases: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    judged = [r for r in report.results if r.status in (Status.PASS, Status.FAIL)]
    seen = {r.case for r in report.results}
    examined = sum(r.examined for r in judged)
    yield f"{_count(len({r.rule for r in judged}), 'rule')} judged in {_count(len(seen), 'case')}" + (
        f", {_count(examined, 'observation')}" if examined else ""
    )
    layers = sum(len(f.get("gradient_errors", {}).get("layers", ())) for f in cases.values())
    if layers:
        yield f"gradients of {_count(layers, 'layer')} beside float64 twins"
    if any(f.get("forecast", {}).get("activations") for f in cases.values()):
        devices = sorted({f["forecast"]["device"] for f in cases.values() if f.get("forecast")})
        yield f"memory by steps predicted for {' and '.join(devices)}"
    if any("static" in f for f in cases.values()):
        yield "no weights were read and no step was run"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
