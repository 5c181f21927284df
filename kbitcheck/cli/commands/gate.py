"""``kbitcheck gate``."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kbitcheck.cli.cases import audit, examine, require_implementation, suite_cases
from kbitcheck.cli.console import say
from kbitcheck.cli.options import IMPL_HELP, SuiteOptions, argument, option, split_codes
from kbitcheck.compare import accept, diff, gate
from kbitcheck.compare.ledger import Ledger, options_of
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_NOTHING, Report
from kbitcheck.core.rule import select
from kbitcheck.models.sources import recipe
from kbitcheck.report.output_file import OutputFile
from kbitcheck.run.configuration import origins, read
from kbitcheck.run.subject import validate

LINES = 5  # of what is accepted; more would hide what is said after it
Compare = Callable[[Report], Report]


@dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    impl: str = argument("[IMPL]", IMPL_HELP, default="", nargs="?", key="implementation")
    ledger: str = option("The accepted results.", "", metavar="FILE", key="ledger")
    accept: bool = option("Write the results of this run to the ledger.", False)
    against: str = option("Compare with this implementation; needs no ledger.", "", metavar="IMPL")


def run(options: Options) -> int:
    """Check an implementation and compare the results with a ledger or with another implementation."""
    require_implementation("gate", options.impl)
    if bool(options.ledger) == bool(options.against):
        raise UsageError("say what to compare with: --ledger FILE, or --against IMPL")
    specs = suite_cases(options.impl, options)
    if options.ledger:
        compare = accepting(options.ledger, specs) if options.accept else comparing(options, specs)
        return audit("gate", specs, options, blame="own", compare=compare)
    if options.accept:
        raise UsageError("--accept writes a ledger, and --against has none")
    if options.in_process:
        raise UsageError("--against cannot run --in-process: two preparations never share a process")
    validate(options.against)
    return audit("gate", specs, options, blame="own", compare=against(options))


def comparing(options: Options, specs: Sequence[CaseSpec]) -> Compare:
    """Compares a report with the ledger, which is read before anything is run."""
    accepted = Ledger.read(options.ledger)
    gate.check_options(accepted, options_of(specs[0].as_json()))
    selection = selected(options, specs)
    return lambda report: gate.judge(report, accepted, recipes=recipe.names(), selection=selection)


def selected(options: Options, specs: Sequence[CaseSpec]) -> gate.Selection:
    """What the run was asked for, and which options or keys of the configuration say so."""
    configuration = read()
    names = {"models": "model", "quants": "quant", "checkpointing": "checkpointing", "compositions": "composition"}
    values = {key: (f"--{name}", getattr(options, name)) for key, name in names.items()}
    rules = select(split_codes(options.select), about={spec.about for spec in specs})
    return gate.Selection(
        rules={rule.code for rule in rules},
        cases={spec.id for spec in specs},
        rules_by=origins(configuration, {"select": ("--select", options.select)}) or f"--suite {options.suite}",
        cases_by=origins(configuration, values) or f"--suite {options.suite}",
    )


def accepting(name: str, specs: Sequence[CaseSpec]) -> Compare:
    """Writes a report's results to the ledger, then compares with it."""
    output = OutputFile(name, "--ledger")
    before = Path(name).read_text(encoding="utf-8") if Path(name).exists() else ""
    old = Ledger.parse(before, name=name) if before else Ledger(name=name, implementation=specs[0].implementation)

    def compare(report: Report) -> Report:
        if not report.complete or report.exit_code == EXIT_NOTHING:
            say(f"{name} is not written: {'nothing was checked' if report.complete else 'the run was cut short'}")
            return report
        text = accept.accept(report, before, name=name)
        if text != before:
            for line in _accepted(
                gate.breaches(gate.judge(report, old, recipes=recipe.names())), specs[0].implementation
            ):
                say(line)
            output.write(text)
        say(f"{name} is {'as it was' if text == before else 'written'}{_without_reason(text, name)}")
        return gate.judge(report, Ledger.parse(text, name=name), accepted=True, recipes=recipe.names())

    return compare


def _without_reason(text: str, name: str) -> str:
    missing = sum(not entry.reason for entry in Ledger.parse(text, name=name).accepted)
    entries = "1 entry has" if missing == 1 else f"{missing} entries have"
    return f"; {entries} no reason yet: until you write it, `kbitcheck gate` fails" if missing else ""


def _accepted(breaches: Sequence[gate.Breach], implementation: str) -> list[str]:
    """What is accepted, a line each; of many their number."""
    if len(breaches) <= LINES:
        return [f"accepted: {breach.line}" for breach in breaches]
    codes = sorted({code for breach in breaches for code in breach.rules})
    rules = f"{len(codes)} rules ({codes[0]} to {codes[-1]})" if len(codes) > 1 else codes[0]
    return [
        f"accepted: {len(breaches)} changes of {rules}; `kbitcheck impl {implementation}` shows what each rule found"
    ]


def against(options: Options) -> Compare:
    """Runs the other implementation on the same cases, in a worker of its own, and compares a report with its report."""

    def compare(report: Report) -> Report:
        if not report.complete:
            return report
        other = examine("gate", suite_cases(options.against, options), options, blame="own")
        names = (options.against, str(report.subject["implementation"].get("name", "it")))
        settled = gate.settle(report, options.against, diff.compare(other, report, names=names))
        return dataclasses.replace(settled, complete=other.complete)

    return compare
