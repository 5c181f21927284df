"""Options as dataclass fields: each declared once, and shared by the commands through inheritance."""

import argparse
import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from typing import Any, NoReturn, get_args

from kbitcheck.cli.help import examples, grouped
from kbitcheck.core.adapters import FORMS, NAMED
from kbitcheck.core.adapters import as_text as adapters_as_text
from kbitcheck.core.cases import ALL_LINEAR, Checkpointing, Freezes, Profile, UseCut
from kbitcheck.core.compositions import COMPOSITIONS, Composition
from kbitcheck.core.errors import UsageError
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.report import FORMATS

ADAPTERS_HELP = f"Adapters: a plain LoRA of the reference's or PEFT's, or a configuration of PEFT's: {', '.join(NAMED)}, or its JSON file."
IMPL_HELP = (
    "reference, peft, trl, llamafactory, axolotl, swift, module:function, path/to/file.py:function or REQUIREMENT::module:function"
    " (peft==0.13.2)."
)
PREPARE_HELP = "reference, peft, trl or any other that `impl` takes; default: peft if installed, else reference."

SUITES = ("quick", "full", "composition")
COLOR = ("auto", "always", "never")

Read = Callable[[str, str], Any]  # the option as the user writes it, and its value
Help = str | Callable[[bool], str]  # a text, or what gives it where help is printed: in full, or not


def quant_help(full: bool) -> str:
    """The schemes of all registered backends, with their options."""
    if not full:
        return "Such as nf4, int8 or nf4,double; repeatable. --help-all lists all."
    from kbitcheck.backends.quantization import usage  # searches the installed packages for backends

    return f"Quantization: {usage()}; repeatable."


def as_text(option: str, value: str) -> str:
    """The value as it stands."""
    return value


def one_of(*choices: str) -> Read:
    """Accept these values alone."""

    def read(option: str, value: str) -> str:
        if value not in choices:
            raise UsageError(f"no such {option}: {value!r}{did_you_mean(value, choices)}; use {', '.join(choices)}")
        return value

    return read


def at_least(minimum: int) -> Read:
    """Accept whole numbers from ``minimum`` on."""

    def read(option: str, value: str) -> int:
        with contextlib.suppress(ValueError):
            if int(value) >= minimum:
                return int(value)
        raise UsageError(f"{option} wants a whole number of at least {minimum}, not {value!r}")

    return read


def above_zero(unit: str) -> Read:
    """Accept finite numbers of this unit above 0."""

    def read(option: str, value: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < float(value) < float("inf"):
                return float(value)
        raise UsageError(f"{option} wants a number of {unit} above 0, not {value!r}")

    return read


def split_codes(texts: Sequence[str]) -> tuple[str, ...]:
    """The codes and prefixes in the values of ``--select``."""
    return tuple(code.strip() for text in texts for code in text.split(",") if code.strip())


def option(
    text: Help,
    default: Any,
    *,
    metavar: str = "",
    read: Read = as_text,
    short: Sequence[str] = (),
    key: str = "",
    choices: Sequence[str] = (),
) -> Any:
    """A field that is an option. A default of False makes it a switch, an empty tuple makes it repeatable.

    ``key`` is that of the configuration whose value holds where the command line has none.
    """
    metadata = {"help": text, "metavar": metavar, "read": read, "short": short, "key": key, "choices": choices}
    return field(default=default, metadata=metadata)


def choice(text: str, default: Any, values: Any, *, key: str = "") -> Any:
    """A field that is an option with fixed values: a ``Literal`` type, or a sequence of texts."""
    choices: Sequence[str] = get_args(values) or values
    return option(text, default, metavar="|".join(choices), read=one_of(*choices), key=key, choices=choices)


def argument(metavar: str, text: str, *, default: Any = MISSING, nargs: str | None = None, key: str = "") -> Any:
    """A field that is a positional argument."""
    return field(default=default, metadata={"help": text, "metavar": metavar, "nargs": nargs, "key": key})


def command_line(metavar: str, text: str) -> Any:
    """A field that is another command's line: all that stands after ``--``."""
    return field(default=(), metadata={"help": text, "metavar": metavar, "nargs": "--"})


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ``UsageError`` and that suggests an option for a misspelt one.

    ``command_line`` names the value that gets what stands after ``--``; empty for a parser without.
    """

    command_line = ""

    def __init__(self, **options: Any) -> None:
        form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
        super().__init__(**options, allow_abbrev=False, formatter_class=form, add_help=False)
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def parse(self, arguments: Sequence[str]) -> dict[str, Any] | None:
        """The values that were typed, by field; None where help or the version was printed instead."""
        others: dict[str, Any] = {}
        if self.command_line:
            place = arguments.index("--") if "--" in arguments else len(arguments)
            others = {self.command_line: tuple(arguments[place + 1 :])}
            arguments = arguments[:place]
        try:
            values, rest = self.parse_known_intermixed_args(arguments)
        except SystemExit:
            return None
        if rest:
            name = rest[0].partition("=")[0]
            if name.startswith("-"):
                self.error(f"No such option: {name}{self._instead(name)}")
            behind = f"; a command stands behind --: {self.prog} -- {' '.join(rest)}" if self.command_line else ""
            self.error(f"unexpected argument: {rest[0]}{behind}")
        return {n: tuple(v) if isinstance(v, list) else v for n, v in vars(values).items()} | others

    def _instead(self, name: str) -> str:
        """What may be meant by an option that is none, in parentheses."""
        if name in ("--prepare", "--impl") and "IMPL" in str(self.usage):  # an option of other commands
            return f" (write the implementation without an option, as in {self.prog} peft)"
        return did_you_mean(name, self._option_string_actions)


def add_options(parser: Parser, kind: type, command: str, *, full: bool = True) -> None:
    """Add one argument for each field of a dataclass of options; without ``full`` the help leaves out what few use."""
    named = {each.name: each for each in fields(kind)}
    positional = [each for each in named.values() if "nargs" in each.metadata]
    parser.usage = " ".join([parser.prog, "[options]", *(each.metadata["metavar"] for each in positional)])
    what = parser.add_argument_group("What")
    for each in positional:
        _add_argument(parser, what, each)
    # A command's own options stand before those that it shares.
    own_first = dict.fromkeys(name for part in kind.__mro__ for name in inspect.get_annotations(part) if name in named)
    groups: dict[str, Any] = {}
    hidden = 0
    for name, title, common in grouped(command, (name for name in own_first if named[name] not in positional)):
        shown = full or common
        hidden += not shown
        group = groups.setdefault(title, parser.add_argument_group(title)) if shown else parser
        _add_option(group, named[name], shown=shown, full=full)
    more = f"\n`{parser.prog} --help-all` lists {hidden} more options." if hidden else ""
    parser.epilog = "\n\n".join(filter(None, [parser.epilog, examples(command) + more]))


def _add_argument(parser: Parser, group: Any, each: Field[Any]) -> None:
    text, metavar = each.metadata["help"], each.metadata["metavar"]
    if each.metadata["nargs"] == "--":
        parser.command_line, parser.epilog = each.name, f"{metavar}: {text}"
        return
    # What is not typed has no value, so that a configuration's can take its place.
    extra: dict[str, Any] = {} if each.default is MISSING else {"default": argparse.SUPPRESS}
    group.add_argument(each.name, metavar=metavar, help=text, nargs=each.metadata["nargs"], **extra)


def _add_option(group: Any, each: Field[Any], *, shown: bool, full: bool) -> None:
    name = "--" + each.name.replace("_", "-")
    names = (*each.metadata["short"], name)
    text = each.metadata["help"]
    text = argparse.SUPPRESS if not shown else text(full) if callable(text) else text
    if each.default is False:
        action = argparse.BooleanOptionalAction if each.metadata["key"] else "store_true"
        group.add_argument(*names, dest=each.name, action=action, help=text, default=argparse.SUPPRESS)
        return
    group.add_argument(
        *names,
        dest=each.name,
        action="append" if each.default == () else "store",
        type=partial(each.metadata["read"], name),
        default=argparse.SUPPRESS,
        metavar=each.metadata["metavar"],
        help=text if each.default in ("", (), None) or not shown else f"{text} [{each.default}]",
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Where a report goes, and how much it shows."""

    format: str = choice("How to render the report.", "text", FORMATS)
    output: str = option("Write the report to this file instead of stdout.", "", metavar="FILE")
    quiet: bool = option("Print the verdict alone, on one line.", False, short=["-q"])
    verbose: bool = option("List passed and skipped rules as well.", False, short=["-v"])
    color: str = choice("When to colour; auto heeds NO_COLOR.", "auto", COLOR)
    debug: bool = option("Show tracebacks and what the worker prints.", False)


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(ReportOptions):
    """Which rules are judged, and what counts."""

    select: Sequence[str] = option(
        "Only these rules; prefixes (KB3) too; repeatable.", (), metavar="CODES", key="select"
    )
    ignore: Sequence[str] = option(
        "Leave a rule out, and say why; repeatable.", (), metavar="CODE=REASON", key="ignore"
    )
    strict: bool = option("Count a broken SHOULD as well.", False, key="strict")

    @property
    def ignored(self) -> dict[str, str]:
        """The reason by ignored code or prefix."""
        pairs = [text.partition("=") for text in self.ignore]
        for code, _, reason in pairs:
            if not code.strip() or not reason.strip():
                raise UsageError(f"--ignore wants CODE=REASON: say why {code.strip() or 'the rule'} is left out")
        return {code.strip(): reason.strip() for code, _, reason in pairs}


@dataclass(frozen=True, kw_only=True)
class RunOptions(JudgeOptions):
    """What all commands that run cases share. What the command line leaves out, the configuration may have."""

    quant: Sequence[str] = option(quant_help, (), metavar="Q", key="quants")
    checkpointing: Sequence[Checkpointing] = choice(
        "Gradient checkpointing; repeatable.", (), Checkpointing, key="checkpointing"
    )
    profile: Profile = choice(
        "The dtypes it promises; by default PEFT's, or a trainer's own.", None, Profile, key="profile"
    )
    device: str = option("auto, cpu, cuda, cuda:1, ...", "auto", metavar="DEVICE")
    adapters: str = option(
        ADAPTERS_HELP, "reference", metavar=FORMS, read=lambda _, value: adapters_as_text(value), key="adapters"
    )
    targets: str = option("Layers that get adapters.", ALL_LINEAR, metavar="all-linear|NAMES")
    rank: int = option("Rank of the adapters.", 4, metavar="N", read=at_least(1))
    freezes: Freezes = choice(
        "When the base model must be frozen; by default at-prepare, or when a trainer does it.", None, Freezes
    )
    batch: int | None = option("Sequences per step.", None, metavar="N", read=at_least(1))
    seq_len: int | None = option("Tokens per sequence.", None, metavar="N", read=at_least(1))
    seed: int = option("Random seed.", 0, metavar="N", read=at_least(0))
    cut: UseCut = choice("When facts about code paths run on a cut: the first blocks of the model.", "if-large", UseCut)
    timeout: float = option(
        "Time limit of one case.", 600, metavar="SECONDS", read=above_zero("seconds"), key="timeout"
    )
    in_process: bool = option("Run in this process: no time limit, no isolation.", False)

    @property
    def case(self) -> dict[str, Any]:
        """The options that every case of the run has in common, by the names of ``CaseSpec``."""
        names = ("profile", "device", "adapters", "targets", "rank", "freezes", "batch", "seq_len", "seed", "cut")
        return {name: getattr(self, name) for name in names}


CONDITIONS_HELP = (
    "What to look at of much: all; a later use by its name (KB515); or other processes alone (KB213, KB514)."
)


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(RunOptions):
    """What ``impl``, ``gate`` and ``matrix`` share: which models, and how many workers."""

    model: Sequence[str] = option(
        "Use these models instead of the suite's; repeatable.", (), metavar="MODEL", key="models"
    )
    suite: str = option("quick, full or composition.", "quick", metavar="SUITE", read=one_of(*SUITES))
    composition: Sequence[Composition] = choice(
        "Judge the prepared model in one of these alone: several processes, a trainer, ...; repeatable.",
        (),
        COMPOSITIONS,
    )
    conditions: str = option(CONDITIONS_HELP, "", metavar="all|processes|USE")
    jobs: int = option(
        "Workers at a time; 0: one for each core where all models are recipes.",
        0,
        metavar="N",
        read=at_least(0),
        key="jobs",
    )
    fuzz: int = option("Judge N random cases instead; --seed selects them.", 0, metavar="N", read=at_least(0))
    hours: float = option(
        "Judge random cases for so long, at first those that failed in an earlier run.",
        0.0,
        metavar="H",
        read=above_zero("hours"),
    )
