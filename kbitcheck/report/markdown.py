"""The report as GitHub-flavoured Markdown, short enough for a pull-request comment as well as for a step summary."""

from collections.abc import Iterator

from kbitcheck.compare.gate import breaches
from kbitcheck.core.report import Report
from kbitcheck.report.parts.broken_rules import broken_rules
from kbitcheck.report.parts.limits import BRIEF, listed
from kbitcheck.report.parts.markup import code, prose, table
from kbitcheck.report.parts.notes import notes
from kbitcheck.report.parts.verdict import verdict
from kbitcheck.report.templates import template

LIMIT = 65_536  # characters in a comment; in UTF-8 at most a quarter of a step summary's 1 MiB
RESERVED = 200


def render(report: Report) -> str:
    """Verdict, changes, a section for each broken rule that folds, environment. What does not fit is left out, with a note."""
    text = ""
    parts = list(_parts(report))
    for number, part in enumerate(parts):
        if len(text) + len(part) > LIMIT - RESERVED:
            return f"{text}\n*… and {len(parts) - number} more sections, left out to fit: see the whole report.*\n"
        text += part
    return text


def _parts(report: Report) -> Iterator[str]:
    implementation = report.subject.get("implementation", {})
    name = " ".join(filter(None, [str(implementation.get("name", "")), str(implementation.get("version", ""))]))
    yield f"### {prose(verdict(report))}\n\n"
    yield f"{code(report.tool)} on {code(BRIEF.text(name) or '?')}, {len({r.case for r in report.results})} cases.\n\n"
    if changes := list(_changes(report)):
        yield "\n".join(table(("", "change", "rules", "cases", "difference", "do"), changes)) + "\n\n"
    for broken in broken_rules(report):
        yield template("broken_rule.md").render(rule=broken)
    if remarks := notes(report):
        yield "".join(f"* {prose(BRIEF.text(note))}\n" for note in remarks) + "\n"
    rows = [(prose(str(k)), code(BRIEF.text(str(v)))) for k, v in report.environment.items() if v != ""]
    if rows:
        lines = "\n".join(table(("", ""), rows))
        yield f"<details><summary>Environment</summary>\n\n{lines}\n\n</details>\n"


def _changes(report: Report) -> Iterator[tuple[str, ...]]:
    for breach in breaches(report):
        cases = listed([code(case) for case in breach.cases], BRIEF.cases)
        difference = code(BRIEF.text(breach.difference))
        yield "✗" if breach.counted else "!", breach.kind, prose(breach.title), cases, difference, prose(breach.todo)
