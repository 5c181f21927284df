"""Counts of rules, not of results: a rule broken in five cases is one broken rule."""

from __future__ import annotations

from collections import Counter

from kbitcheck.core.report import EXIT_BROKEN_RULE, EXIT_CONFORMS, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_NOTHING, Report
from kbitcheck.core.result import Result, Status

WORST_FIRST = ("broken", "not judged", "warning", "kept", "not applicable")


class Tally:
    """How many rules were broken, could not be judged, were warned of, kept, or did not apply."""

    def __init__(self, report: Report) -> None:
        self._report = report
        worst: dict[str, str] = {}
        for result in report.results:
            kinds = {worst.get(result.rule, WORST_FIRST[-1]), kind(report, result)}
            worst[result.rule] = min(kinds, key=WORST_FIRST.index)
        self.rules = Counter(worst.values())

    @property
    def verdict(self) -> str:
        """The answer in two words, with its mark."""
        if self._report.gate is not None and self._report.exit_code in (EXIT_CONFORMS, EXIT_BROKEN_RULE):
            return f"{'✗ changed' if self._report.exit_code else '✓ not worse'} against {self._report.gate['against']}"
        model = self._report.subject.get("command") in ("model", "audit")
        static = any("static" in facts for facts in self._report.facts.get("cases", {}).values())
        return {
            EXIT_CONFORMS: "✓ nothing rules it out" if static else "✓ ready" if model else "✓ conforms",
            EXIT_BROKEN_RULE: "✗ not ready" if model else "✗ does not conform",
            EXIT_ERROR: "✗ could not be judged",
            EXIT_INTERRUPTED: "✗ interrupted",
            EXIT_NOTHING: "✗ nothing was checked",
        }[self._report.exit_code]

    def line(self) -> str:
        """The verdict and the counts; in a gate, of the changes by kind."""
        if self._report.gate is not None:
            kinds = Counter(b["kind"] for b in self._report.gate["breaches"] if b["counted"])
            told = sum(not b["counted"] for b in self._report.gate["breaches"])
            parts = [f"{number} {name}" for name, number in kinds.items()] + ([f"{told} told"] if told else [])
            return f"{self.verdict}: {', '.join(parts) or 'nothing changed'}"
        counts = [
            f"{number} {text if number == 1 else plural}"
            for name, text, plural in (
                ("broken", "rule broken", "rules broken"),
                ("not judged", "could not be judged", "could not be judged"),
                ("warning", "warning", "warnings"),
                ("kept", "kept", "kept"),
                ("not applicable", "not applicable", "not applicable"),
            )
            if (number := self.rules[name]) or name == "kept"
        ]
        if ignored := len(self._report.subject.get("ignored", {})):
            counts.append(f"{ignored} ignored")
        return f"{self.verdict}: {', '.join(counts)}"


def kind(report: Report, result: Result) -> str:
    """Which of ``WORST_FIRST`` a result is."""
    if result.status is Status.ERROR:
        return "not judged"
    if result.status is Status.FAIL:
        return "broken" if report.counts(result) else "warning"
    return "kept" if result.status is Status.PASS else "not applicable"
