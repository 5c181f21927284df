"""What the commands that run cases share: build the cases, run them, render the report."""

import contextlib
import sys
from collections.abc import Callable, Sequence

from kbitcheck.cli.console import echo, progress, say
from kbitcheck.cli.options import RunOptions, SuiteOptions, split_codes
from kbitcheck.cli.show_report import show_report
from kbitcheck.cli.signals import signals_as_interrupts
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.machine import validate_device
from kbitcheck.core.report import Blame, Report
from kbitcheck.core.rule import select
from kbitcheck.models.sources import resolve as models
from kbitcheck.report.output_file import OutputFile
from kbitcheck.run import requirements, suites, virtualenvs
from kbitcheck.run.configuration import OWN_FILE, read, subject_of
from kbitcheck.run.runner import run
from kbitcheck.run.subject import validate
from kbitcheck.run.suites import workers
from kbitcheck.run.worker import debug_to_stderr


def suite_cases(impl: str, options: SuiteOptions) -> list[CaseSpec]:
    """The cases that ``impl``, ``gate`` and ``matrix`` run."""
    if options.fuzz or options.hours:
        raise UsageError("--fuzz and --hours belong to `kbitcheck impl`: random cases are no fixed set to compare")
    for name in options.model:
        models.resolve(name)
    return suites.suite_cases(
        options.suite,
        compositions=options.composition,
        models=options.model,
        quants=options.quant,
        checkpointing=options.checkpointing,
        implementation=impl,
        conditions=options.conditions,
        **options.case,
    )


def require_implementation(command: str, impl: str) -> None:
    """Raise a ``UsageError`` where neither the command line nor the configuration names an implementation."""
    if not impl:
        raise UsageError(
            f"which implementation? write kbitcheck {command} IMPL, or implementation = ... into {OWN_FILE}; "
            f"see `kbitcheck {command} --help`"
        )


def audit(
    command: str,
    specs: Sequence[CaseSpec],
    options: RunOptions,
    *,
    blame: Blame,
    compare: Callable[[Report], Report] = lambda report: report,
    exit_code: Callable[[Report], int] = lambda report: report.exit_code,
) -> int:
    """Run the cases, compare and render the report, write its verdict to stderr; returns the exit code."""
    validate(specs[0].implementation)
    output = OutputFile(options.output)
    report = compare(examine(command, specs, options, blame=blame))
    show_report(report, options, output)
    return exit_code(report)


def examine(command: str, specs: Sequence[CaseSpec], options: RunOptions, *, blame: Blame) -> Report:
    """The report of these cases, with their progress on stderr while they run."""
    validate_device(options.device)
    if specs[0].static != "always":
        install(specs[0].implementation, in_process=options.in_process)
    rules = select(split_codes(options.select), options.ignored, about={spec.about for spec in specs})
    results = sum(rule.about == spec.about for spec in specs for rule in rules)
    # In process, what the implementation prints must not get into the report.
    quiet = contextlib.redirect_stdout(sys.stderr) if options.in_process else contextlib.nullcontext()
    if options.in_process and options.debug:
        debug_to_stderr()
    with signals_as_interrupts(), quiet, progress(results, len(specs), quiet=options.quiet) as advance:
        return run(
            specs,
            rules,
            timeout=options.timeout,
            jobs=(options.jobs if isinstance(options, SuiteOptions) else 1) or workers(specs),
            in_process=options.in_process,
            blame=blame,
            strict=options.strict,
            subject={"command": command, "ignored": options.ignored, **subject_of(read())},
            on_event=advance,
            echo=echo if options.debug else None,
        )


def install(impl: str, *, in_process: bool = False) -> None:
    """Build the virtual environment of an implementation that is named by a requirement."""
    if in_process and requirements.parse(impl):
        raise UsageError(f"{impl} cannot run --in-process: it has an environment of its own")
    with signals_as_interrupts():
        virtualenvs.interpreter(impl, say)
