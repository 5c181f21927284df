"""``kbitcheck watch``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kbitcheck.cli.console import echo, say
from kbitcheck.cli.options import JudgeOptions, at_least, choice, command_line, option, split_codes
from kbitcheck.core.cases import Profile
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_NOTHING, Report
from kbitcheck.core.training import STEPS
from kbitcheck.report.parts.verdict import NOTHING, verdict
from kbitcheck.run import watched_command


@dataclass(frozen=True, kw_only=True)
class Options(JudgeOptions):
    command: Sequence[str] = command_line("-- COMMAND...", "The command to run, as you run it: python train.py ...")
    steps: int = option("Optimizer steps to watch.", STEPS, metavar="N", read=at_least(1))
    profile: Profile = choice("The dtypes to judge by; auto reads them off the model.", "auto", Profile)
    trains: Sequence[str] = option(
        "Parts of the model that are meant to train beside adapters, such as v_head; repeatable.", (), metavar="NAMES"
    )
    output: str = option("Write the report to this file instead of stderr.", "", metavar="FILE")


def run(options: Options) -> int:
    """Run a command with the watcher inside; returns its exit code, or the report's where that is 0."""
    if not options.command:
        raise UsageError("write the command after --: kbitcheck watch -- python train.py")
    # What only a report needs is imported for one: a script without a quantized model pays for none of it.
    output = None
    if options.output:
        from kbitcheck.report.output_file import OutputFile

        output = OutputFile(options.output)
    settings: dict[str, Any] = {
        "steps": options.steps,
        "select": split_codes(options.select),
        "ignore": options.ignored,
        "strict": options.strict,
        "profile": options.profile,
        "trains": split_codes(options.trains),
    }
    if options.select or options.ignore:
        from kbitcheck.run.watch_settings import Settings

        Settings(**settings).validate()

    def show(report: Report) -> None:
        if output is None and options.quiet:
            return
        from kbitcheck.cli.show_report import text_of

        text = text_of(report, options, terminal=False)
        echo(text) if output is None else output.write(text)

    ended = watched_command.run(options.command, settings, on_report=show)
    if ended.failed:
        say(f"kbitcheck: {ended.failed}")
    if ended.report is None:
        say(f"kbitcheck: {NOTHING}" + ("" if ended.failed else ": no quantized model took an optimizer step"))
        return ended.code or EXIT_NOTHING
    say(f"kbitcheck: {verdict(ended.report)}")
    return ended.code or ended.report.exit_code
