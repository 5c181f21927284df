"""The report as GitHub-flavoured Markdown, short enough for a pull-request comment as well as for a step summary."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kbitcheck.core.report import Report
from kbitcheck.core.rule import rules
from kbitcheck.report.parts.counts import Tally
from kbitcheck.report.parts.evidence import clipped, whose_it_is
from kbitcheck.report.parts.findings import Finding, by_rule, deviations, findings
from kbitcheck.report.parts.repro import command

LIMIT = 65_536  # characters in a comment; in UTF-8 at most a quarter of a step summary's 1 MiB
RESERVED = 200
DEVIATIONS = 3
PLACES = 8
CASES = 12
SIGNATURES = 4  # ways in which one rule failed
SPECIAL = re.compile(r"([\\*_{}\[\]()#+!~])")


def render(report: Report) -> str:
    """Verdict, changes, a section for each finding that folds, environment. What does not fit is left out, and said."""
    text = ""
    parts = list(_parts(report))
    for number, part in enumerate(parts):
        if len(text) + len(part) > LIMIT - RESERVED:
            return f"{text}\n*… and {len(parts) - number} more sections, left out to fit: see the whole report.*\n"
        text += part
    return text


def _parts(report: Report) -> Iterator[str]:
    implementation = report.subject.get("implementation", {})
    who = " ".join(filter(None, [str(implementation.get("name", "")), str(implementation.get("version", ""))]))
    yield f"### {prose(Tally(report).line())}\n\n"
    yield f"{code(report.tool)} on {code(who or '?')}, {len({r.case for r in report.results})} cases.\n\n"
    yield from _changes(report)
    for variants in by_rule(findings(report)):
        if report.gate is None or variants[0].counted:
            yield _finding(report, variants)
    rows = "".join(
        f"| {cell(prose(str(k)))} | {cell(code(str(v)))} |\n" for k, v in report.environment.items() if v != ""
    )
    if rows:
        yield f"<details><summary>Environment</summary>\n\n| | |\n|---|---|\n{rows}\n</details>\n"


def _changes(report: Report) -> Iterator[str]:
    if report.gate is None or not report.gate["breaches"]:
        return
    from kbitcheck.compare.gate import Breach, named

    yield "| | change | rules | cases | what | do |\n|---|---|---|---|---|---|\n"
    for breach in map(Breach.from_json, report.gate["breaches"]):
        mark = "✗" if breach.counted else "!"
        yield (
            f"| {mark} | {breach.kind} | {cell(prose(named(breach.rules)))} | {cell(_cases(breach.cases))} "
            f"| {cell(code(breach.told))} | {cell(prose(breach.todo))} |\n"
        )
    yield "\n"


def _finding(report: Report, variants: Sequence[Finding]) -> str:
    first = variants[0]
    rule = None if first.error else rules().get(first.rules[0])
    mark = "✗" if first.counted or first.error else "!"
    codes = ", ".join(first.rules[:4]) + (", …" if len(first.rules) > 4 else "")
    parties = dict.fromkeys(whose_it_is(report, d.party) for v in variants for d in deviations(v.failures))
    whose = " and ".join(parties) or "not judged"
    number = len({case for v in variants for case in v.cases})
    title = (
        f"{mark} <b>{codes}</b> {html(rule.name if rule else '')} ({first.level}, {html(whose)}), "
        f"{number} {'case' if number == 1 else 'cases'}"
    )
    body = [prose(rule.requirement)] if rule else []
    for variant in variants[:SIGNATURES]:
        body += _variant(report, variant)
    if rest := sum(len(v.cases) for v in variants[SIGNATURES:]):
        body.append(f"Otherwise in {rest} more {'case' if rest == 1 else 'cases'}.")
    if rule is not None:
        body += [
            f"**{heading}**: {prose(text)}"
            for heading, text in (("You will see", rule.section("Symptom")), ("Do", rule.section("Fix")))
            if text
        ]
    if again := command(report, first.cases[0], first.rules[0]):
        body.append(f"Again: {code(again, whole=True)}")
    opened = " open" if first.counted else ""
    return f"<details{opened}><summary>{title}</summary>\n\n" + "\n\n".join(body) + "\n\n</details>\n\n"


def _variant(report: Report, finding: Finding) -> Iterator[str]:
    found = deviations(finding.failures)
    yield f"In {_cases(finding.cases)}:"
    for seen in found[:DEVIATIONS]:
        rest = len(seen.where) - PLACES
        places = ", ".join(map(code, seen.where[:PLACES])) + (f", and {rest} more" if rest > 0 else "")
        witness = f" ({prose(whose_it_is(report, seen.party))}: {code(seen.witness)})" if seen.witness else ""
        yield f"- {places}: expected {code(seen.expected)}, found {code(seen.actual)}{witness}"
    if len(found) > DEVIATIONS:
        yield f"- and {len(found) - DEVIATIONS} more"
    if finding.reason:
        yield code(finding.reason)


def _cases(cases: tuple[str, ...]) -> str:
    rest = len(cases) - CASES
    return ", ".join(map(code, cases[:CASES])) + (f", and {rest} more" if rest > 0 else "")


def code(text: str, *, whole: bool = False) -> str:
    """A code span, in which nothing is markup, a mention or a link."""
    text = " ".join(text.split()) if whole else clipped(text)
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def cell(markup: str) -> str:
    """Markup in a table, which splits at pipes before it looks for code."""
    return markup.replace("|", "\\|")


def prose(text: str) -> str:
    """Words of our own, which may hold code between backticks; all else in them is literal."""
    words, *rest = re.split(r"`([^`]+)`", text)
    out = [_literal(words)]
    for span, words in zip(rest[::2], rest[1::2], strict=True):
        out += [code(span), _literal(words)]
    return "".join(out)


def _literal(text: str) -> str:
    return html(SPECIAL.sub(r"\\\1", text).replace("`", "\\`"))


def html(text: str) -> str:
    """Text that holds no tag and no entity."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
