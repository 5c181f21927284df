"""The command line's options, declared once and shared by the commands."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, Literal, cast, get_args, get_type_hints

import typer

from kbitcheck.core.cases import ALL_LINEAR, Adapters, Checkpointing, Freezes, Profile
from kbitcheck.core.errors import UsageError

Task = Literal[
    "causal-lm", "seq2seq-lm", "image-text-to-text", "speech-seq2seq", "sequence-classification", "masked-lm"
]

MODES: tuple[str, ...] = get_args(Checkpointing)
FORMATS = ("text", "json", "junit", "sarif", "markdown", "html")


@dataclass(kw_only=True)
class Output:
    """Where a report goes, and how much it tells."""

    format: Annotated[str, typer.Option(metavar="|".join(FORMATS), help="How to render the report.")] = "text"
    output: Annotated[str, typer.Option(metavar="FILE", help="Write the report here instead of to stdout.")] = ""
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List what passed and was skipped as well.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the worker prints.")] = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"no such format: {self.format!r}; use {', '.join(FORMATS)}")


@dataclass(kw_only=True)
class Shared(Output):
    """What ``model``, ``impl`` and ``gate`` share."""

    quant: Annotated[
        list[str],
        typer.Option(
            metavar="Q",
            help="nf4|fp4[,double][,compute=bf16][,storage=uint8][,skip=lm_head] or int8[,skip=..]; repeatable.",
        ),
    ] = field(default_factory=list)
    # typer has no list of literals; checked below.
    checkpointing: Annotated[
        list[str], typer.Option(metavar="|".join(MODES), help="Gradient checkpointing; repeatable.")
    ] = field(default_factory=list)
    profile: Annotated[Profile, typer.Option(help="The recipe of dtypes that the preparation promises.")] = "peft"
    select: Annotated[list[str], typer.Option(metavar="CODES", help="Only these rules; prefixes (KB3) too.")] = field(
        default_factory=list
    )
    ignore: Annotated[
        list[str], typer.Option(metavar="CODE=REASON", help="Leave a rule out, and say why; repeatable.")
    ] = field(default_factory=list)
    strict: Annotated[bool, typer.Option("--strict", help="Count a broken SHOULD as well.")] = False
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")] = "auto"
    adapters: Annotated[Adapters, typer.Option(help="Whose LoRA is attached.")] = "reference"
    targets: Annotated[str, typer.Option(metavar="all-linear|NAMES", help="Layers that get adapters.")] = ALL_LINEAR
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 4
    freezes: Annotated[Freezes, typer.Option(help="When the base is to be frozen.")] = "at-prepare"
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences a step.")] = None
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens a sequence.")] = None
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Time limit of one case.")] = 600.0
    in_process: Annotated[bool, typer.Option("--in-process", help="No worker: no time limit, no isolation.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for mode in self.checkpointing:
            if mode not in MODES:
                raise UsageError(f"no such --checkpointing: {mode!r}; use {', '.join(MODES)}")
        if not 0 < self.timeout < float("inf"):
            raise UsageError(f"--timeout wants a number of seconds above 0, not {self.timeout:g}")

    @property
    def modes(self) -> list[Checkpointing]:
        """The checkpointing modes that were named."""
        return cast("list[Checkpointing]", self.checkpointing)

    @property
    def codes(self) -> tuple[str, ...]:
        """The selected codes and prefixes."""
        return tuple(code.strip() for text in self.select for code in text.split(",") if code.strip())

    @property
    def ignored(self) -> dict[str, str]:
        """The reason why by ignored code or prefix.

        Raises:
            UsageError: a reason is missing.
        """
        pairs = [text.partition("=") for text in self.ignore]
        for code, _, reason in pairs:
            if not code.strip() or not reason.strip():
                raise UsageError(f"--ignore wants CODE=REASON: say why {code.strip() or 'the rule'} is left out")
        return {code.strip(): reason.strip() for code, _, reason in pairs}

    @property
    def case(self) -> dict[str, Any]:
        """The options that every case of the run has in common, by the names of ``CaseSpec``."""
        names = ("profile", "device", "adapters", "targets", "rank", "freezes", "batch", "seq_len", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class ModelOptions(Shared):
    """What only ``model`` takes."""

    prepare: Annotated[str, typer.Option(metavar="IMPL", help="Default: peft if installed, else reference.")] = ""
    static: Annotated[bool, typer.Option("--static", help="Read and make no weights: sizes and predictions.")] = False
    memory: Annotated[str, typer.Option(metavar="SIZE", help="What training has to fit into: 24GiB, 80GB.")] = ""
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Draw weights for a bare config.")] = False
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="Load in this dtype: bf16, fp16 or fp32.")] = ""
    revision: Annotated[str, typer.Option(metavar="REVISION", help="Of a hub id.")] = ""
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Load a checkpoint that can run code.")] = False

    @property
    def case(self) -> dict[str, Any]:
        from kbitcheck.observe.forecast import memory_sizes as fits

        return {
            **super().case,
            "memory": fits.parse(self.memory) if self.memory else None,
            "random_weights": self.random_weights,
            "dtype": self.dtype or None,
            "revision": self.revision or None,
            "trust_remote_code": self.trust_remote_code,
            "allow_pickle": self.allow_pickle,
        }


@dataclass(kw_only=True)
class ImplOptions(Shared):
    """What only ``impl`` takes."""

    model: Annotated[list[str], typer.Option(metavar="MODEL", help="Instead of the suite's; repeatable.")] = field(
        default_factory=list
    )
    suite: Annotated[Literal["quick", "full"], typer.Option(help="Which recipes.")] = "quick"
    jobs: Annotated[
        int, typer.Option(min=0, metavar="N", help="Workers at once; 0: one a core where all models are recipes.")
    ] = 0
    fuzz: Annotated[int, typer.Option(metavar="N", min=0, help="Judge N drawn cases instead; --seed names them.")] = 0


@dataclass(kw_only=True)
class MatrixOptions(ImplOptions):
    """What ``matrix`` takes: the options of ``impl``, and formats of its own."""

    format: Annotated[str, typer.Option(metavar="text|json|markdown|html", help="How to render the table.")] = "text"

    def __post_init__(self) -> None:
        if self.format in ("junit", "sarif"):
            raise UsageError(f"no such format of a matrix: {self.format!r}; use text, json, markdown or html")
        super().__post_init__()


@dataclass(kw_only=True)
class SweepOptions:
    """What ``sweep`` takes."""

    task: Annotated[Task, typer.Option(help="Which of transformers' lists of architectures.")] = "causal-lm"
    select: Annotated[
        list[str], typer.Option(metavar="NAME", help="Only these model types; shell patterns too. Repeatable.")
    ] = field(default_factory=list)
    quant: Annotated[str, typer.Option(metavar="Q", help="As for `kbitcheck model`.")] = "nf4"
    checkpointing: Annotated[Checkpointing, typer.Option(help="Gradient checkpointing.")] = "default"
    prepare: Annotated[str, typer.Option(metavar="IMPL", help="Default: peft if installed, else reference.")] = ""
    profile: Annotated[Profile, typer.Option(help="The recipe of dtypes that the preparation promises.")] = "peft"
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Workers at once, one thread each.")] = 1
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only the I-th of N parts of the list.")] = "1/1"
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Time limit of one architecture.")] = 120.0
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")] = "auto"
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0
    format: Annotated[Literal["text", "json", "markdown"], typer.Option(help="How to render the table.")] = "text"
    output: Annotated[
        str, typer.Option(metavar="FILE", help="Write the table here; FILE.jsonl beside it keeps rows as they come.")
    ] = ""
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the workers print.")] = False

    def __post_init__(self) -> None:
        if not 0 < self.timeout < float("inf"):
            raise UsageError(f"--timeout wants a number of seconds above 0, not {self.timeout:g}")
        _ = self.part

    @property
    def part(self) -> tuple[int, int]:
        """The shard as numbers: which one, of how many.

        Raises:
            UsageError: it is not I/N with I from 1 to N.
        """
        found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.shard)
        if found is None or int(found[1]) > int(found[2]):
            raise UsageError(f"--shard wants I/N with I from 1 to N, not {self.shard!r}")
        return int(found[1]), int(found[2])


def with_options(command: Callable[..., int]) -> Callable[..., int]:
    """Replace the parameter ``options`` by one command-line option for each field of its dataclass."""
    hints = get_type_hints(command, include_extras=True)
    kind = hints["options"]
    types = get_type_hints(kind, include_extras=True)

    @functools.wraps(command)
    def parsed(**values: Any) -> int:
        options = kind(**{f.name: values.pop(f.name) for f in fields(kind)})
        return command(**values, options=options)

    parameters = [
        p.replace(annotation=hints[name], kind=p.KEYWORD_ONLY)
        for name, p in inspect.signature(command).parameters.items()
        if name != "options"
    ]
    for f in fields(kind):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        parameters.append(
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[f.name])
        )
    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parsed.__annotations__ = {p.name: p.annotation for p in parameters}
    return parsed
