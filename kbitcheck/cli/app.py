"""The ``kbitcheck`` command: parse, run, render. It and the door are all that prints and exits."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kbitcheck.cli.main import fail, list_rules, say
from kbitcheck.cli.options import ImplOptions, MatrixOptions, ModelOptions, Output, Shared, SweepOptions, with_options
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_BROKEN_RULE, EXIT_CONFORMS, EXIT_ERROR, EXIT_NOTHING, Report
from kbitcheck.core.rule import select
from kbitcheck.core.version import TOOL

if TYPE_CHECKING:
    from kbitcheck.core.cases import CaseSpec
    from kbitcheck.run.runner import Blame

# Without markup typer's help needs no rich, which takes as long to import as all the rest.
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Conformance tests for k-bit preparation.",
)

MODEL_HELP = "tiny:llama, a recipe file, org/name on the hub, a local directory, or a config."
IMPL_HELP = (
    "reference, peft, module:function, path/to/file.py:function, or REQUIREMENT::module:function (peft==0.13.2)."
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(TOOL)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Does a k-bit preparation keep its promises, and will a model survive it?"""


@app.command()
@with_options
def model(model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)], options: ModelOptions) -> int:
    """Will this model survive k-bit preparation and train, and what will it cost?"""
    from kbitcheck.models.sources import resolve as models
    from kbitcheck.run import subject as implementations
    from kbitcheck.run import suites as suite

    if options.static and options.random_weights:
        raise UsageError("--static makes no weights: leave out --random-weights")
    prepare = options.prepare or implementations.default()
    source = models.resolve(
        model,
        static="always" if options.static else "if-too-large",
        random_weights=options.random_weights,
        dtype=options.dtype or None,
        revision=options.revision or None,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
    )
    specs = suite.cases(
        (),
        models=[model],
        quants=options.quant or [getattr(source, "quant", None) or "nf4"],
        checkpointing=options.modes or ["default"],
        implementation=prepare,
        static="always" if options.static or not getattr(source, "loadable", True) else "if-too-large",
        **options.case,
    )
    return audit("model", specs, options, blame="any")


@app.command()
@with_options
def impl(impl: Annotated[str, typer.Argument(metavar="IMPL", help=IMPL_HELP)], options: ImplOptions) -> int:
    """Does this preparation function keep the specification?"""
    if options.fuzz:
        return fuzzed(impl, options)
    return audit("impl", impl_cases(impl, options), options, blame="own")


def fuzzed(impl: str, options: ImplOptions) -> int:
    """Judge drawn cases, and render the report of the smallest that fails, or of all."""
    from kbitcheck.backends.quantization import Quantization
    from kbitcheck.cli.output_file import Destination
    from kbitcheck.cli.progress import shown
    from kbitcheck.cli.signals import told_to_stop
    from kbitcheck.core import machine as environment
    from kbitcheck.models.sources import resolve as models
    from kbitcheck.report import render, verdict
    from kbitcheck.run import subject as implementations

    try:
        from kbitcheck.run import fuzz
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise UsageError("--fuzz needs hypothesis: pip install 'kbitcheck[fuzz]'") from None
    if options.in_process:
        raise UsageError("--fuzz cannot run --in-process: a case that ends its process must not end the run")
    implementations.validate(impl)
    environment.validate_device(options.device)
    for name in options.model:
        models.resolve(name)
    install(impl)
    destination = Destination(options.output)
    chosen = select(options.codes, options.ignored)
    plan = fuzz.Plan(
        implementation=impl,
        rules=chosen,
        number=options.fuzz,
        seed=options.seed,
        strict=options.strict,
        models=options.model,
        quants=[str(Quantization.parse(quant)) for quant in options.quant],
        checkpointing=options.modes,
        options={name: value for name, value in options.case.items() if name != "seed"},
    )
    with told_to_stop(), shown(options.fuzz) as advance:
        report = fuzz.fuzz(plan, timeout=options.timeout, on_event=advance, echo=_echo if options.debug else None)
    rendered = render(report, options.format, verbose=options.verbose, terminal=destination.terminal)
    destination.write(rendered + (f"\n{fuzz.told(report)}" if options.format == "text" else ""))
    say(verdict(report))
    return report.exit_code


def impl_cases(impl: str, options: ImplOptions) -> list[CaseSpec]:
    """The cases that ``impl`` and ``gate`` run."""
    from kbitcheck.models.sources import resolve as models
    from kbitcheck.run import suites as suite

    if options.fuzz:
        raise UsageError("--fuzz belongs to `kbitcheck impl`: what is drawn is no fixed set of cases to compare")
    for name in options.model:
        models.resolve(name)
    return suite.cases(
        suite.FULL if options.suite == "full" else suite.QUICK,
        models=options.model,
        quants=options.quant,
        checkpointing=options.modes,
        implementation=impl,
        **options.case,
    )


@app.command()
@with_options
def gate(
    impl: Annotated[str, typer.Argument(metavar="IMPL", help=IMPL_HELP)],
    options: ImplOptions,
    ledger: Annotated[str, typer.Option(metavar="FILE", help="The accepted results.")] = "",
    accept: Annotated[bool, typer.Option("--accept", help="Write what is found to the ledger.")] = False,
    against: Annotated[str, typer.Option(metavar="IMPL", help="Compare with this one; needs no ledger.")] = "",
) -> int:
    """Has it changed against what was accepted?"""
    from kbitcheck.run import subject as implementations

    if bool(ledger) == bool(against):
        raise UsageError("say what to compare with: --ledger FILE, or --against IMPL")
    specs = impl_cases(impl, options)
    if ledger:
        return audit("gate", specs, options, blame="own", judge=ledger_judge(ledger, specs, accept=accept))
    if accept:
        raise UsageError("--accept writes a ledger, and --against has none")
    if options.in_process:
        raise UsageError("--against cannot run --in-process: two preparations never share a process")
    implementations.validate(against)
    return audit("gate", specs, options, blame="own", judge=other_judge(against, options))


@app.command()
@with_options
def matrix(
    subjects: Annotated[list[str], typer.Argument(metavar="IMPL...", help=f"{IMPL_HELP} Or a TOML list of them.")],
    options: MatrixOptions,
) -> int:
    """Which rules do several implementations or releases keep?"""
    from kbitcheck.cli.output_file import Destination
    from kbitcheck.compare import matrix
    from kbitcheck.report.tables.matrix import render, verdict

    chosen = matrix.subjects(subjects)
    destination = Destination(options.output)
    cases = impl_cases("", options)
    if options.in_process:
        raise UsageError("a matrix cannot run --in-process: two preparations never share a process")

    def judge(impl: str) -> Report:
        return examine("impl", impl_cases(impl, options), options, blame="own")

    rows: list[matrix.Row] = []
    for number, subject in enumerate(chosen, 1):
        rows.append(matrix.row(subject, judge))
        say(f"{number}/{len(chosen)} {verdict(rows[-1:])}")
        if not rows[-1].complete:
            break
    words = ["kbitcheck", *sys.argv[1:]]
    table = matrix.Matrix(
        tool=TOOL,
        command=shlex.join(words),
        cases=[spec.id for spec in cases],
        rows=rows,
    )
    destination.write(render(table, options.format))
    return table.exit_code


@app.command()
@with_options
def diff(
    before: Annotated[str, typer.Argument(metavar="A.json")],
    after: Annotated[str, typer.Argument(metavar="B.json")],
    options: Output,
) -> int:
    """Compare two saved reports: did anything get worse?"""
    from kbitcheck.cli.output_file import Destination
    from kbitcheck.compare import diff, gate
    from kbitcheck.report import render, verdict

    destination = Destination(options.output)
    saved = [read_report(name) for name in (before, after)]
    found = gate.settle(saved[1], before, diff.compare(*saved, names=(before, after)))
    destination.write(render(found, options.format, verbose=options.verbose, terminal=destination.terminal))
    say(verdict(found))
    return EXIT_BROKEN_RULE if any(b["counted"] for b in (found.gate or {})["breaches"]) else EXIT_CONFORMS


@app.command()
def rules(code: Annotated[str, typer.Argument(metavar="CODE", help="A code or a prefix.")] = "") -> int:
    """List the rules, or explain one."""
    return list_rules(code)


@app.command()
def selftest(
    codes: Annotated[str, typer.Option("--select", metavar="CODES", help="Only these rules.")] = "",
    matrix: Annotated[bool, typer.Option("--matrix", help="Every fault by every rule, as a page in Markdown.")] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Time limit of the whole.")] = 3600.0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the worker prints.")] = False,
) -> int:
    """Prove on this machine that every rule bites."""
    from kbitcheck.cli.output_file import Destination
    from kbitcheck.cli.signals import told_to_stop
    from kbitcheck.report.tables.kill_matrix import page
    from kbitcheck.run.runner import selftest
    from kbitcheck.run.worker_process import Lost

    chosen = [rule.code for rule in select([c.strip() for c in codes.split(",") if c.strip()])]
    stdout = Destination("")
    found = []
    run = selftest(chosen, matrix=matrix, timeout=timeout, echo=_echo if debug else None)
    try:
        with told_to_stop(), contextlib.closing(run):
            for event in run:
                if event["event"] == "sabotage":
                    word = {True: "caught", False: "MISSED", None: "untold"}[event["caught"]]
                    line = f"{word}  {event['code']}  {event['fault']}  [{event['case']}]  {event['told']}"
                    say(line) if matrix else stdout.write(line + "\n")
                    found.append(event)
    except Lost as lost:
        return fail(f"the selftest broke: {lost}", EXIT_ERROR)
    if matrix:
        stdout.write(page(found))
    caught = [event["caught"] for event in found if event["caught"] is not None]
    say(f"{sum(caught)} of {len(caught)} sabotages caught")
    return EXIT_NOTHING if not caught else EXIT_CONFORMS if all(caught) else EXIT_BROKEN_RULE


@app.command()
@with_options
def sweep(options: SweepOptions) -> int:
    """Audit every architecture that transformers knows, tiny and with random weights."""
    from kbitcheck.cli.output_file import Destination
    from kbitcheck.cli.signals import told_to_stop
    from kbitcheck.report.tables.sweep import render, verdict
    from kbitcheck.run.sweep import swept
    from kbitcheck.run.worker_process import Lost

    destination = Destination(options.output)
    try:
        with told_to_stop():
            table = swept(options, say=say, echo=_echo if options.debug else None)
    except Lost as lost:
        return fail(f"the architectures cannot be listed: {lost}", EXIT_ERROR)
    destination.write(render(table, options.format))
    say(verdict(table))
    return table.exit_code


@app.command()
@with_options
def show(report: Annotated[str, typer.Argument(metavar="REPORT.json")], options: Output) -> int:
    """Render a saved report."""
    from kbitcheck.cli.output_file import Destination
    from kbitcheck.report import render

    destination = Destination(options.output)
    saved = read_report(report)
    try:
        text = render(saved, options.format, verbose=options.verbose, terminal=destination.terminal)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{report} is not a kbitcheck report: {str(error).splitlines()[0]}") from error
    destination.write(text)
    return EXIT_CONFORMS


def read_report(name: str) -> Report:
    """The report saved in a file.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    import json

    try:
        return Report.from_json(json.loads(Path(name).read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from error
    except (UsageError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{name} is not a kbitcheck report: {str(error).splitlines()[0]}") from error


def ledger_judge(name: str, specs: Sequence[CaseSpec], *, accept: bool) -> Callable[[Report], Report]:
    """What compares a report with the ledger, and with ``accept`` writes it first; a wrong one is told before the run.

    Raises:
        UsageError: the ledger is missing, malformed, cannot be written or was accepted under other options.
    """
    from kbitcheck.cli.output_file import Destination
    from kbitcheck.compare import accept as acceptance
    from kbitcheck.compare import gate
    from kbitcheck.compare.ledger import Ledger, options_of

    if not accept:
        accepted = Ledger.read(name)
        gate.check_options(accepted, options_of(specs[0].as_json()))
        return lambda report: gate.judge(report, accepted)
    destination = Destination(name, "--ledger")
    before = Path(name).read_text(encoding="utf-8") if Path(name).exists() else ""
    old = Ledger.parse(before, name=name) if before else Ledger(name=name, implementation=specs[0].implementation)

    def judge(report: Report) -> Report:
        if not report.complete or report.exit_code == EXIT_NOTHING:
            say(f"{name} is not written: {'nothing was checked' if report.complete else 'the run was cut short'}")
            return report
        text = acceptance.accept(report, before, name=name)
        if text != before:
            for breach in gate.compare(report, old):
                say(f"accepted: {breach.line}")
            destination.write(text)
        say(f"{name} is {'as it was' if text == before else 'written'}")
        return gate.judge(report, Ledger.parse(text, name=name), accepted=True)

    return judge


def other_judge(other: str, options: ImplOptions) -> Callable[[Report], Report]:
    """What runs another implementation on the same cases, in a worker of its own, and compares with it."""
    from kbitcheck.compare import diff, gate

    def judge(report: Report) -> Report:
        if not report.complete:
            return report
        reference = examine("gate", impl_cases(other, options), options, blame="own")
        found = diff.compare(reference, report, names=(other, str(report.subject["implementation"].get("name", "it"))))
        return dataclasses.replace(gate.settle(report, other, found), complete=reference.complete)

    return judge


def same(report: Report) -> Report:
    """The judge of a run that nothing is compared with."""
    return report


def audit(
    command: str,
    specs: Sequence[CaseSpec],
    options: Shared,
    *,
    blame: Blame,
    judge: Callable[[Report], Report] = same,
) -> int:
    """Run the cases, judge and render the report and say how it ended."""
    from kbitcheck.cli.output_file import Destination
    from kbitcheck.run import subject as implementations

    implementations.validate(specs[0].implementation)
    destination = Destination(options.output)
    report = judge(examine(command, specs, options, blame=blame))
    from kbitcheck.report import render, verdict

    destination.write(render(report, options.format, verbose=options.verbose, terminal=destination.terminal))
    say(verdict(report))
    return report.exit_code


def examine(command: str, specs: Sequence[CaseSpec], options: Shared, *, blame: Blame) -> Report:
    """Run the cases, with a bar on a terminal."""
    from kbitcheck.cli.progress import shown
    from kbitcheck.cli.signals import told_to_stop
    from kbitcheck.core import machine as environment
    from kbitcheck.run.runner import run
    from kbitcheck.run.suites import workers
    from kbitcheck.run.worker import debug_to_stderr

    environment.validate_device(options.device)
    if specs[0].static != "always":
        install(specs[0].implementation, in_process=options.in_process)
    chosen = select(options.codes, options.ignored)
    # In process, what the subject prints must not get into the report.
    quiet = contextlib.redirect_stdout(sys.stderr) if options.in_process else contextlib.nullcontext()
    if options.in_process and options.debug:
        debug_to_stderr()
    with told_to_stop(), quiet, shown(len(specs) * len(chosen)) as advance:
        return run(
            specs,
            chosen,
            timeout=options.timeout,
            jobs=getattr(options, "jobs", 1) or workers(specs),
            in_process=options.in_process,
            blame=blame,
            strict=options.strict,
            subject={"command": command, "ignored": options.ignored},
            on_event=advance,
            echo=_echo if options.debug else None,
        )


def install(impl: str, *, in_process: bool = False) -> None:
    """Build the environment of an implementation, where it is a requirement.

    Raises:
        UsageError: it cannot be built, or is to run in this process.
    """
    from kbitcheck.cli.signals import told_to_stop
    from kbitcheck.run import requirements as requirement
    from kbitcheck.run import virtualenvs as environments

    if requirement.parse(impl) is None:
        return
    if in_process:
        raise UsageError(f"{impl} cannot run --in-process: it has an environment of its own")
    with told_to_stop():
        environments.interpreter(impl, say)


def _echo(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
