"""``kbitcheck model``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from kbitcheck.cli.cases import audit
from kbitcheck.cli.console import echo, fail
from kbitcheck.cli.options import PREPARE_HELP, RunOptions, argument, at_least, choice, option, split_codes
from kbitcheck.cli.signals import signals_as_interrupts
from kbitcheck.core import memory_sizes
from kbitcheck.core.cases import MODEL_RANK, Attention, Autocast, CaseSpec, Loss, Optimizer, Profile
from kbitcheck.core.errors import Lost, UsageError
from kbitcheck.core.machine import validate_device
from kbitcheck.core.report import EXIT_CONFORMS, EXIT_ERROR, Report, worst
from kbitcheck.core.rule import select
from kbitcheck.models.sources import resolve as models
from kbitcheck.report.output_file import OutputFile
from kbitcheck.report.tables.plan import FORMATS as PLAN_FORMATS
from kbitcheck.report.tables.plan import render
from kbitcheck.run.configuration import OWN_FILE
from kbitcheck.run.runner import plans
from kbitcheck.run.subject import default, default_profile
from kbitcheck.run.suites import cases

MODEL_HELP = "tiny:llama, a recipe file, org/name on the hub, a local directory, or a config."
PROFILE_HELP = "The dtypes to judge by; default: peft for peft and reference, otherwise auto, read off the model."
AUTOCAST_HELP = (
    "Autocast of the forecast steps; default: bf16, as of Trainer(bf16=True), or fp16 on a GPU without bf16."
)
ATTENTION_HELP = "Attention of the forecast steps; default: the model's own. flash_attention_2 needs no package here."
IMAGE_HELP = "Width and height of the images of the forecast steps, where the configuration states no size (1024)."
LOSS_HELP = "Loss of the forecast steps: of all logits, of chunks, or fused with the head as Liger's."

DRAWN = ("html", "json")  # formats that have a map of what fits, or that one is made from


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    model: Sequence[str] = argument("[MODEL...]", MODEL_HELP, default=(), nargs="*", key="models")
    prepare: str = option(PREPARE_HELP, "", metavar="IMPL", key="implementation")
    profile: Profile = choice(PROFILE_HELP, None, Profile, key="profile")
    plan: bool = option("Print what it would compute, in which time and memory; run nothing.", False)
    static: bool = option("Predict sizes and memory without reading or creating weights.", False)
    memory: str = option("Memory that training has to fit into: 24GiB, 80GB, T4, A100-80.", "", metavar="SIZE|GPU")
    fits: bool = option("Forecast what fits into each common GPU; takes up to a minute.", False)
    autocast: Autocast | None = choice(AUTOCAST_HELP, None, ("bf16", "fp16", "none"))
    attention: Attention | None = choice(ATTENTION_HELP, None, ("sdpa", "eager", "flash_attention_2"))
    packed: bool = option("Forecast steps of sequences packed into one row, without padding.", False)
    loss: Loss = choice(LOSS_HELP, "full", Loss)
    image_size: int | None = option(IMAGE_HELP, None, metavar="PIXELS", read=at_least(1))
    optimizer: Optimizer = choice("Optimizer of the forecast.", "adamw", Optimizer)
    accumulate: int = option("Batches that an optimizer step adds up.", 1, metavar="N", read=at_least(1))
    gpus: int = option(
        "GPUs; above 1, the forecast has bytes for each under DDP, FSDP2, ZeRO-3.", 1, metavar="N", read=at_least(1)
    )
    rank: int = option("Rank of the adapters.", MODEL_RANK, metavar="N", read=at_least(1))
    random_weights: bool = option("Give a config without weights random ones.", False)
    dtype: str | None = option("Load in this dtype: bf16, fp16 or fp32.", None, metavar="DTYPE")
    revision: str | None = option("Hub revision (branch, tag or commit).", None, metavar="REVISION")
    trust_remote_code: bool = option("Run the model's own code.", False)
    allow_pickle: bool = option("Load a checkpoint format that can run code.", False)

    @property
    def source(self) -> dict[str, Any]:
        """How the model is read, by the names of ``CaseSpec``."""
        names = ("random_weights", "dtype", "revision", "trust_remote_code", "allow_pickle")
        return {name: None if (value := getattr(self, name)) == "" else value for name in names}


def run(options: Options) -> int:
    """Audit one model; a failure counts whoever it is attributed to."""
    if options.static and options.random_weights:
        raise UsageError("--static makes no weights: leave out --random-weights")
    if options.plan and (options.static or options.format not in PLAN_FORMATS):
        raise UsageError(f"--plan goes without --static, and with --format {' or '.join(PLAN_FORMATS)}")
    if not options.model:
        raise UsageError(
            f"which model? write kbitcheck model MODEL, such as tiny:llama, or models = [...] into {OWN_FILE}; "
            "see `kbitcheck model --help`"
        )
    specs = [spec for model in options.model for spec in model_cases(model, options)]
    if options.plan:
        return show_plans(specs, options)
    return audit("model", specs, options, blame="any", exit_code=worst_exit_code)


def model_cases(model: str, options: Options) -> list[CaseSpec]:
    """The cases of one model."""
    source = models.resolve(model, static="always" if options.static else "if-too-large", **options.source)
    only_static = options.static or not getattr(source, "loadable", True)
    implementation = options.prepare or default()
    return cases(
        (),
        models=[model],
        quants=options.quant or [getattr(source, "quant", None) or "nf4"],
        checkpointing=options.checkpointing or ["default"],
        implementation=implementation,
        static="always" if only_static else "if-too-large",
        memory=memory_sizes.parse(options.memory) if options.memory else None,
        gpu=memory_sizes.gpu(options.memory),
        autocast=options.autocast or "default",
        attention=options.attention or "default",
        packed=options.packed,
        loss=options.loss,
        image_size=options.image_size,
        fits=options.fits,
        cells=bool(options.memory) and options.format in DRAWN,
        optimizer=options.optimizer,
        accumulate=options.accumulate,
        gpus=options.gpus,
        **{**options.case, "profile": cast("Profile | None", options.profile) or default_profile(implementation)},
        **options.source,
    )


def worst_exit_code(report: Report) -> int:
    """The worst of the models' exit codes: of one that had nothing to check, too."""
    cases_of: dict[str, set[str]] = {}
    for case, spec in report.subject.get("cases", {}).items():
        cases_of.setdefault(spec["model"], set()).add(case)
    parts = [replace(report, results=[r for r in report if r.case in cases]) for cases in cases_of.values()]
    return worst(part.exit_code for part in parts) if parts else report.exit_code


def show_plans(specs: Sequence[CaseSpec], options: Options) -> int:
    """Write the plans of the cases."""
    validate_device(options.device)
    output = OutputFile(options.output)
    rules = select(split_codes(options.select), options.ignored)
    try:
        with signals_as_interrupts():
            planned = plans(specs, rules, timeout=options.timeout, echo=echo if options.debug else None)
    except Lost as lost:
        return fail(f"the plan cannot be made: {lost}", EXIT_ERROR)
    output.write(render(planned, options.format))
    return EXIT_CONFORMS
