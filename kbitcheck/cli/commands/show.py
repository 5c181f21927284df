"""``kbitcheck show``."""

from dataclasses import dataclass

from kbitcheck.cli.options import ReportOptions, argument
from kbitcheck.cli.saved_report import read_report
from kbitcheck.cli.show_report import show_report
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_CONFORMS
from kbitcheck.report.output_file import OutputFile


@dataclass(frozen=True, kw_only=True)
class Options(ReportOptions):
    report: str = argument("REPORT.json", "A report that --format json wrote.")


def run(options: Options) -> int:
    """Render a saved report."""
    output = OutputFile(options.output)
    report = read_report(options.report)
    try:
        show_report(report, options, output, says_verdict=False)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{options.report} is not a kbitcheck report: {str(error).splitlines()[0]}") from error
    return EXIT_CONFORMS
