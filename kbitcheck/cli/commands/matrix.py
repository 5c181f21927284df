"""``kbitcheck matrix``."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from kbitcheck.cli.cases import examine, suite_cases
from kbitcheck.cli.console import say
from kbitcheck.cli.options import IMPL_HELP, SuiteOptions, argument, choice, option
from kbitcheck.cli.show_report import show_table
from kbitcheck.compare.matrix import Matrix, Row, Subject, row, subjects
from kbitcheck.core.errors import UsageError
from kbitcheck.core.pace import Pace
from kbitcheck.core.report import Report
from kbitcheck.core.version import TOOL
from kbitcheck.report.output_file import OutputFile
from kbitcheck.report.report_folder import ReportFolder
from kbitcheck.report.tables.matrix import render, summary, verdict
from kbitcheck.run.subject import validate


@dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    subjects: Sequence[str] = argument("IMPL...", f"{IMPL_HELP} Or a TOML file that lists several.", nargs="+")
    format: str = choice("How to render the table.", "text", ("text", "json", "markdown", "html"))
    reports: str = option("Write the report behind each row into this folder, a JSON file each.", "", metavar="DIR")


def run(options: Options) -> int:
    """Check each implementation on the same cases; one row each."""
    chosen = subjects(options.subjects, validate)
    output = OutputFile(options.output)
    folder = ReportFolder(options.reports, [subject.name for subject in chosen if not subject.left_out])
    specs = suite_cases("", options)
    if options.in_process:
        raise UsageError("a matrix cannot run --in-process: two preparations never share a process")

    def judge(subject: Subject) -> Report:
        report = examine("impl", suite_cases(subject.implementation, options), options, blame="own")
        folder.write(subject.name, report)
        return report

    rows: list[Row] = []
    pace = Pace(len(chosen))
    for number, subject in enumerate(chosen, 1):
        rows.append(row(subject, judge))
        if not options.quiet:
            say(f"{number}/{len(chosen)} {verdict(rows[-1])}" + (f"; {pace.left(number)}" if pace.due() else ""))
        if not rows[-1].complete:
            break
    command = shlex.join(["kbitcheck", *sys.argv[1:]])
    table = Matrix(tool=TOOL, command=command, cases=[spec.id for spec in specs], rows=rows)
    show_table(render(table, options.format), summary(table), options, output)
    return table.exit_code
