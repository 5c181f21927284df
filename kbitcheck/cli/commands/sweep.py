"""``kbitcheck sweep``."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields

from kbitcheck.backends.quantization import Quantization
from kbitcheck.cli.console import echo, fail, say
from kbitcheck.cli.options import PREPARE_HELP, above_zero, at_least, choice, option
from kbitcheck.cli.show_report import show_table
from kbitcheck.cli.signals import signals_as_interrupts
from kbitcheck.core.cases import CaseSpec, Checkpointing, Profile
from kbitcheck.core.errors import Lost, UsageError
from kbitcheck.core.report import EXIT_ERROR
from kbitcheck.report.output_file import OutputFile
from kbitcheck.report.tables.sweep import FORMATS, render, verdict
from kbitcheck.run.subject import default
from kbitcheck.run.sweep import swept

TASKS = (
    "causal-lm", "seq2seq-lm", "image-text-to-text", "speech-seq2seq", "sequence-classification", "masked-lm",
)  # fmt: skip
SAME_TABLE = ("quant", "checkpointing", "prepare", "profile", "shard", "seed")  # options that decide the rows


def shard(name: str, value: str) -> str:
    """I/N with I from 1 to N."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", value)
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"{name} wants I/N with I from 1 to N, not {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class Options:
    task: str = choice("Which of transformers' lists of architectures.", "causal-lm", TASKS)
    select: Sequence[str] = option("Only these model types; shell patterns too; repeatable.", (), metavar="NAME")
    quant: str = option("Quantization, as for `kbitcheck model`.", "nf4", metavar="Q")
    checkpointing: Checkpointing = choice("Gradient checkpointing.", "default", Checkpointing)
    prepare: str = option(PREPARE_HELP, "", metavar="IMPL")
    profile: Profile = choice("The dtypes that the preparation promises.", "peft", Profile)
    jobs: int = option("Workers at a time, one thread each.", 1, metavar="N", read=at_least(1))
    shard: str = option("Only the I-th of N parts of the list.", "1/1", metavar="I/N", read=shard)
    timeout: float = option("Time limit of one architecture.", 120, metavar="SECONDS", read=above_zero("seconds"))
    device: str = option("auto, cpu, cuda, cuda:1, ...", "auto", metavar="DEVICE")
    seed: int = option("Random seed.", 0, metavar="N", read=at_least(0))
    format: str = choice("How to render the table.", "text", FORMATS)
    output: str = option(
        "Write the table to this file; FILE.jsonl beside it keeps each row as it comes.", "", metavar="FILE"
    )
    quiet: bool = option("Print the verdict alone, on one line.", False, short=["-q"])
    debug: bool = option("Show tracebacks and what the workers print.", False)

    @property
    def command(self) -> str:
        """The command that gives the same table again."""
        words = ["kbitcheck", "sweep", "--task", self.task]
        words += [word for name in self.select for word in ("--select", name)]
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in SAME_TABLE and value != each.default:
                words += [f"--{each.name}", str(value)]
        return shlex.join(words)


def run(options: Options) -> int:
    """Audit the architectures of a task; one row each."""
    output = OutputFile(options.output)
    template = CaseSpec(
        model="",
        quant=str(Quantization.parse(options.quant)),
        implementation=options.prepare or default(),
        checkpointing=options.checkpointing,
        profile=options.profile,
        device=options.device,
        seed=options.seed,
    )
    part, parts = map(int, options.shard.split("/"))
    try:
        with signals_as_interrupts():
            table = swept(
                options.task, template, select=options.select, shard=(part, parts), jobs=options.jobs,
                timeout=options.timeout, output=options.output, command=options.command,
                say=(lambda line: None) if options.quiet else say, echo=echo if options.debug else None,
            )  # fmt: skip
    except Lost as lost:
        return fail(f"the architectures cannot be listed: {lost}", EXIT_ERROR)
    show_table(render(table, options.format), verdict(table), options, output)
    if not options.quiet:
        say(verdict(table))
    return table.exit_code
