"""The plugin's options: on the command line, or under the same names in the ini file."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import pytest

from kbitcheck.core.errors import UsageError
from kbitcheck.core.rule import Rule, select

if TYPE_CHECKING:
    from kbitcheck.core.cases import CaseSpec, Checkpointing
    from kbitcheck.pytest_plugin.accepted import Accepted


FORMS = {
    ".json": "json", ".txt": "text", ".xml": "junit", ".sarif": "sarif", ".md": "markdown", ".html": "html",
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """An option with a value: ``--kbit-NAME``, and ``kbit_NAME`` in the ini file."""

    metavar: str
    help: str
    default: str = ""
    _: KW_ONLY
    repeatable: bool = False


OPTIONS = {
    "impl": Option("IMPL", "Collect conformance tests of this preparation: module:function, file.py:function, peft."),
    "model": Option("MODEL", "Use these models instead of the suite's; repeatable.", repeatable=True),
    "quant": Option("Q", "Quantization, with options as in `kbitcheck impl --quant`; repeatable.", repeatable=True),
    "checkpointing": Option("MODE", "reentrant, non-reentrant, default or off; repeatable.", repeatable=True),
    "profile": Option("PROFILE", "The dtypes that the preparation promises: peft, qlora or frozen-half.", "peft"),
    "select": Option("CODES", "Only these rules; prefixes (KB3) too; repeatable.", repeatable=True),
    "suite": Option("SUITE", "Suite of recipes: quick or full.", "quick"),
    "timeout": Option("SECONDS", "Time limit of one case.", "600"),
    "device": Option("DEVICE", "auto, cpu, cuda, cuda:1, ...", "auto"),
    "report": Option("FILE", f"Write the report to this file; the suffix selects the format ({', '.join(FORMS)})."),
    "ledger": Option("FILE", "Compare with the accepted results in this ledger."),
}
STRICT = "Count a broken SHOULD as well."


def declare(parser: pytest.Parser) -> None:
    """Add the options and their ini keys, all text, so that they cross to xdist's workers."""
    group = parser.getgroup("kbitcheck", "conformance of k-bit preparation")
    for name, option in OPTIONS.items():
        group.addoption(
            f"--kbit-{name}",
            dest=f"kbit_{name}",
            action="append" if option.repeatable else "store",
            metavar=option.metavar,
            default=None,
            help=f"{option.help} [{option.default}]" if option.default else option.help,
        )
        kind: Literal["linelist", "string"] = "linelist" if option.repeatable else "string"
        parser.addini(f"kbit_{name}", f"--kbit-{name}", kind, [] if option.repeatable else "")
    group.addoption("--kbit-strict", dest="kbit_strict", action="store_true", default=None, help=STRICT)
    parser.addini("kbit_strict", "--kbit-strict", "bool", False)


@dataclass(frozen=True)
class Settings:
    """The options as the user typed them; properties check the values that they return."""

    implementation: str
    models: tuple[str, ...]
    quants: tuple[str, ...]
    checkpointing: tuple[str, ...]
    profile: str
    select: tuple[str, ...]
    suite: str
    timeout_text: str
    device: str
    report: str
    ledger: str
    strict: bool

    @classmethod
    def read(cls, config: pytest.Config) -> Settings:
        """The options of this run; the ini file has those that the command line leaves out."""
        base = config.invocation_params.dir

        def text(name: str) -> str:
            return str(config.getoption(f"kbit_{name}") or config.getini(f"kbit_{name}") or OPTIONS[name].default)

        def texts(name: str) -> tuple[str, ...]:
            return tuple(config.getoption(f"kbit_{name}") or config.getini(f"kbit_{name}"))

        def file(name: str) -> str:
            """A path, relative to where pytest was started, or in the ini file to the root directory."""
            typed = config.getoption(f"kbit_{name}")
            return str(base / typed if typed else config.rootpath / text(name)) if text(name) else ""

        return cls(
            implementation=implementation_from(text("impl"), base, config.rootpath),
            models=texts("model"),
            quants=texts("quant"),
            checkpointing=texts("checkpointing"),
            profile=text("profile"),
            select=tuple(code.strip() for part in texts("select") for code in part.split(",") if code.strip()),
            suite=text("suite"),
            timeout_text=text("timeout"),
            device=text("device"),
            report=file("report"),
            ledger=file("ledger"),
            strict=bool(config.getoption("kbit_strict") or config.getini("kbit_strict")),
        )

    @cached_property
    def rules(self) -> list[Rule]:
        """The selected rules.

        Raises:
            UsageError: a code that matches none.
        """
        return select(self.select)

    @cached_property
    def timeout(self) -> float:
        """Seconds a case may take.

        Raises:
            UsageError: no number, or none above 0.
        """
        try:
            seconds = float(self.timeout_text)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise UsageError(f"--kbit-timeout wants a number of seconds above 0, not {self.timeout_text!r}")
        return seconds

    @property
    def form(self) -> str:
        """The format of ``--kbit-report``.

        Raises:
            UsageError: the suffix names none.
        """
        form = FORMS.get(Path(self.report).suffix)
        if form is None:
            raise UsageError(f"--kbit-report {self.report}: the suffix names no format; use {', '.join(FORMS)}")
        return form

    @cached_property
    def specs(self) -> list[CaseSpec]:
        """The cases of ``--kbit-impl``; none without it.

        Raises:
            UsageError: an option is wrong.
        """
        if not self.implementation:
            return []
        from kbitcheck.core import machine as environment
        from kbitcheck.core.cases import Checkpointing, Profile
        from kbitcheck.core.suggest import did_you_mean
        from kbitcheck.run import subject as implementations
        from kbitcheck.run import suites as suite

        for option, values, choices in (
            ("profile", (self.profile,), get_args(Profile)),
            ("checkpointing", self.checkpointing, get_args(Checkpointing)),
            ("suite", (self.suite,), ("quick", "full")),
        ):
            for value in values:
                if value not in choices:
                    hint = did_you_mean(value, choices)
                    raise UsageError(f"no such --kbit-{option}: {value!r}{hint}; use {', '.join(choices)}")
        implementations.validate(self.implementation)
        environment.validate_device(self.device)
        return suite.cases(
            suite.suite_cells(self.suite),
            models=self.models,
            quants=self.quants,
            checkpointing=cast("tuple[Checkpointing, ...]", self.checkpointing),
            implementation=self.implementation,
            profile=self.profile,
            device=self.device,
        )

    @cached_property
    def accepted(self) -> Accepted | None:
        """The ledger of ``--kbit-ledger``; None without it.

        Raises:
            UsageError: the ledger is missing, malformed, or was accepted under other options.
        """
        if not self.ledger:
            return None
        from kbitcheck.compare import gate
        from kbitcheck.compare.ledger import Ledger, options_of
        from kbitcheck.pytest_plugin.accepted import Accepted

        if not self.specs:
            raise UsageError("--kbit-ledger needs --kbit-impl: a ledger is of one implementation")
        ledger = Ledger.read(self.ledger)
        gate.check_options(ledger, options_of(self.specs[0].as_json()))
        return Accepted(ledger)

    def check(self) -> None:
        """Check all options, without torch.

        Raises:
            UsageError: one line that says what is wrong.
        """
        _ = self.rules, self.timeout, self.specs, self.accepted
        if self.models:
            from kbitcheck.models.sources import resolve as models

            for name in self.models:
                models.resolve(name)
        if self.report:
            from kbitcheck.report.output_file import OutputFile

            _ = self.form
            OutputFile(self.report, "--kbit-report")


def implementation_from(implementation: str, *directories: Path) -> str:
    """The name of an implementation; a relative file that stands in one of ``directories`` becomes a path from here."""
    where, _, attribute = implementation.rpartition(":")
    if where.endswith(".py") and not Path(where).is_file():
        for directory in directories:
            if (directory / where).is_file():
                return f"{os.path.relpath(directory / where)}:{attribute}"
    return implementation


def any_option(config: pytest.Config) -> bool:
    """Whether any of the options is set, on the command line or in the ini file."""
    values: list[Any] = [config.getoption(f"kbit_{n}") or config.getini(f"kbit_{n}") for n in (*OPTIONS, "strict")]
    return any(values)
