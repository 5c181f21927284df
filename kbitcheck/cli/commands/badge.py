"""``kbitcheck badge``."""

from dataclasses import dataclass

from kbitcheck.cli.options import argument, option
from kbitcheck.cli.saved_report import read_report
from kbitcheck.core.report import EXIT_CONFORMS
from kbitcheck.report.badge import render
from kbitcheck.report.output_file import OutputFile


@dataclass(frozen=True, kw_only=True)
class Options:
    report: str = argument("REPORT.json", "A report that --format json wrote.")
    output: str = option("Write the badge to this file instead of stdout.", "", metavar="FILE")
    debug: bool = option("Show tracebacks.", False)


def run(options: Options) -> int:
    """Write the badge of a saved report."""
    output = OutputFile(options.output)
    output.write(render(read_report(options.report)))
    return EXIT_CONFORMS
