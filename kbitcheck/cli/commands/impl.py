"""``kbitcheck impl``."""

from dataclasses import dataclass

from kbitcheck.backends.quantization import Quantization
from kbitcheck.cli.cases import audit, install, require_implementation, suite_cases
from kbitcheck.cli.console import echo, progress
from kbitcheck.cli.options import IMPL_HELP, SuiteOptions, argument, split_codes
from kbitcheck.cli.show_report import show_report
from kbitcheck.cli.signals import signals_as_interrupts
from kbitcheck.core.conditions import FEW
from kbitcheck.core.errors import UsageError
from kbitcheck.core.machine import validate_device
from kbitcheck.core.profile import with_kept
from kbitcheck.core.rule import select
from kbitcheck.models.sources import resolve as models
from kbitcheck.report.output_file import OutputFile
from kbitcheck.run.subject import validate

UNLIMITED = 10**9  # cases: hypothesis wants a number


@dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    impl: str = argument("[IMPL]", IMPL_HELP, default="", nargs="?", key="implementation")


def run(options: Options) -> int:
    """Check one implementation on a suite, or on random cases; only its own failures count."""
    require_implementation("impl", options.impl)
    if options.fuzz or options.hours:
        return run_fuzz(options)
    return audit("impl", suite_cases(options.impl, options), options, blame="own")


def run_fuzz(options: Options) -> int:
    """Judge random cases; render the report of the smallest one that fails, or of all."""
    try:
        from kbitcheck.run import fuzz  # hypothesis is an optional dependency
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise UsageError("--fuzz and --hours need hypothesis: pip install 'kbitcheck[fuzz]'") from None
    if options.in_process:
        raise UsageError("random cases cannot run --in-process: a case that ends its process must not end the run")
    validate(options.impl)
    validate_device(options.device)
    for name in options.model:
        models.resolve(name)
    install(options.impl)
    output = OutputFile(options.output)
    plan = fuzz.Plan(
        implementation=options.impl,
        rules=select(split_codes(options.select), options.ignored),
        number=options.fuzz or UNLIMITED,
        seconds=options.hours * 3600 or float("inf"),
        seed=options.seed,
        strict=options.strict,
        models=options.model,
        quants=[str(Quantization.parse(quant)) for quant in options.quant],
        checkpointing=options.checkpointing,
        options={name: value for name, value in with_kept(options.case, options.impl).items() if name != "seed"}
        | {"conditions": options.conditions or FEW},
    )
    with signals_as_interrupts(), progress(None, options.fuzz or None, quiet=options.quiet) as advance:
        report = fuzz.fuzz(plan, timeout=options.timeout, on_event=advance, echo=echo if options.debug else None)
    show_report(report, options, output, epilogue=f"\n{fuzz.epilogue(report)}" if options.format == "text" else "")
    return report.exit_code
