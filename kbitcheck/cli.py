"""The ``kbitcheck`` command: parse, run, render. It and the door are all that prints and exits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import kbitcheck
from kbitcheck.core import (
    EXIT_BROKEN_RULE,
    EXIT_CONFORMS,
    EXIT_ERROR,
    EXIT_NOTHING,
    Report,
    UsageError,
    select,
)
from kbitcheck.door import fail, list_rules, say
from kbitcheck.options import ImplOptions, ModelOptions, Output, Shared, with_options

if TYPE_CHECKING:
    from kbitcheck.run import Blame
    from kbitcheck.suite import CaseSpec

# Without markup typer's help needs no rich, which takes as long to import as all the rest.
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Conformance tests for k-bit preparation.",
)

MODEL_HELP = "tiny:llama, a recipe file, org/name on the hub, a local directory, or a config."
IMPL_HELP = "reference, peft, module:function or path/to/file.py:function."


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kbitcheck {kbitcheck.__version__}")
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
    from kbitcheck import implementations, models, suite

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
    from kbitcheck import models, suite

    if options.fuzz:
        raise UsageError("--fuzz is not built yet; use --suite full")
    for name in options.model:
        models.resolve(name)
    specs = suite.cases(
        suite.FULL if options.suite == "full" else suite.QUICK,
        models=options.model,
        quants=options.quant,
        checkpointing=options.modes,
        implementation=impl,
        **options.case,
    )
    return audit("impl", specs, options, blame="own")


@app.command()
@with_options
def gate(
    impl: Annotated[str, typer.Argument(metavar="IMPL", help=IMPL_HELP)],
    options: Shared,
    ledger: Annotated[str, typer.Option(metavar="FILE", help="The accepted results.")] = "",
    accept: Annotated[bool, typer.Option("--accept", help="Write the ledger.")] = False,
) -> int:
    """(Not built yet.) Has it changed against what was accepted?"""
    raise UsageError("`kbitcheck gate` is not built yet; use `kbitcheck impl`")


@app.command()
def rules(code: Annotated[str, typer.Argument(metavar="CODE", help="A code or a prefix.")] = "") -> int:
    """List the rules, or explain one."""
    return list_rules(code)


@app.command()
def selftest(
    codes: Annotated[str, typer.Option("--select", metavar="CODES", help="Only these rules.")] = "",
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Time limit of the whole.")] = 3600.0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the worker prints.")] = False,
) -> int:
    """Prove on this machine that every rule bites."""
    from kbitcheck.destination import Destination
    from kbitcheck.process import Lost
    from kbitcheck.run import selftest
    from kbitcheck.signals import told_to_stop

    chosen = [rule.code for rule in select([c.strip() for c in codes.split(",") if c.strip()])]
    stdout = Destination("")
    caught: list[bool] = []
    try:
        with (
            told_to_stop(),
            contextlib.closing(selftest(chosen, timeout=timeout, echo=_echo if debug else None)) as run,
        ):
            for event in run:
                if event["event"] == "sabotage":
                    word = {True: "caught", False: "MISSED", None: "untold"}[event["caught"]]
                    stdout.write(f"{word}  {event['code']}  {event['fault']}  [{event['case']}]  {event['told']}\n")
                    caught += [] if event["caught"] is None else [event["caught"]]
    except Lost as lost:
        return fail(f"the selftest broke: {lost}", EXIT_ERROR)
    say(f"{sum(caught)} of {len(caught)} sabotages caught")
    return EXIT_NOTHING if not caught else EXIT_CONFORMS if all(caught) else EXIT_BROKEN_RULE


@app.command()
@with_options
def show(report: Annotated[str, typer.Argument(metavar="REPORT.json")], options: Output) -> int:
    """Render a saved report."""
    import json

    from kbitcheck.destination import Destination
    from kbitcheck.reporters import render

    destination = Destination(options.output)
    try:
        saved = Report.from_json(json.loads(Path(report).read_text(encoding="utf-8")))
        text = render(saved, options.format, verbose=options.verbose, terminal=destination.terminal)
    except OSError as error:
        raise UsageError(f"cannot read {report}: {error.strerror}") from error
    except (UsageError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{report} is not a kbitcheck report: {str(error).splitlines()[0]}") from error
    destination.write(text)
    return EXIT_CONFORMS


def audit(command: str, specs: Sequence[CaseSpec], options: Shared, *, blame: Blame) -> int:
    """Run the cases, render the report and say how it ended."""
    from kbitcheck import environment, implementations
    from kbitcheck.destination import Destination
    from kbitcheck.progress import shown
    from kbitcheck.run import run
    from kbitcheck.signals import told_to_stop

    implementations.validate(specs[0].implementation)
    environment.validate_device(options.device)
    chosen = select(options.codes, options.ignored)
    destination = Destination(options.output)
    # In process, what the subject prints must not get into the report.
    quiet = contextlib.redirect_stdout(sys.stderr) if options.in_process else contextlib.nullcontext()
    with told_to_stop(), quiet, shown(len(specs) * len(chosen)) as advance:
        report = run(
            specs,
            chosen,
            timeout=options.timeout,
            in_process=options.in_process,
            blame=blame,
            strict=options.strict,
            subject={"command": command, "ignored": options.ignored},
            on_event=advance,
            echo=_echo if options.debug else None,
        )
    from kbitcheck.reporters import render, verdict

    destination.write(render(report, options.format, verbose=options.verbose, terminal=destination.terminal))
    say(verdict(report))
    return report.exit_code


def _echo(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
