"""``kbitcheck diff``."""

from dataclasses import dataclass

from kbitcheck.cli.options import ReportOptions, argument
from kbitcheck.cli.saved_report import read_report
from kbitcheck.cli.show_report import show_report
from kbitcheck.compare import diff, gate
from kbitcheck.core.report import EXIT_BROKEN_RULE, EXIT_CONFORMS
from kbitcheck.report.output_file import OutputFile


@dataclass(frozen=True, kw_only=True)
class Options(ReportOptions):
    before: str = argument("A.json", "The earlier report.")
    after: str = argument("B.json", "The later report.")


def run(options: Options) -> int:
    """Compare two saved reports; a change for the worse is exit code 1."""
    output = OutputFile(options.output)
    before, after = read_report(options.before), read_report(options.after)
    changes = diff.compare(before, after, names=(options.before, options.after))
    report = gate.settle(after, options.before, changes)
    show_report(report, options, output)
    return EXIT_BROKEN_RULE if any(b["counted"] for b in (report.gate or {})["breaches"]) else EXIT_CONFORMS
