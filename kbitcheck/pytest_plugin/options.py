"""The plugin's options: on the command line, or under the same names in the ini file."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import pytest

from kbitcheck.core.cases import CaseSpec, Checkpointing, Profile
from kbitcheck.core.errors import UsageError
from kbitcheck.core.rule import Rule, select

if TYPE_CHECKING:
    from kbitcheck.compare.ledger import Ledger
    from kbitcheck.run.configuration import Configuration

FORMS = {
    ".json": "json", ".txt": "text", ".xml": "junit", ".sarif": "sarif", ".md": "markdown", ".html": "html",
}  # fmt: skip


class Option(NamedTuple):
    """An option with a value: ``--kbit-NAME``, and ``kbit_NAME`` in the ini file."""

    metavar: str
    help: str
    default: str = ""
    repeatable: bool = False


OPTIONS = {
    "impl": Option("IMPL", "Collect conformance tests of this preparation: module:function, file.py:function, peft."),
    "model": Option("MODEL", "Use these models instead of the suite's; repeatable.", repeatable=True),
    "quant": Option("Q", "Quantization, with options as in `kbitcheck impl --quant`; repeatable.", repeatable=True),
    "checkpointing": Option("MODE", "reentrant, non-reentrant, default or off; repeatable.", repeatable=True),
    "profile": Option(
        "PROFILE", "The dtypes that the preparation promises: peft (the default), qlora, frozen-half or auto."
    ),
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


class Settings:
    """The options as the user typed them; properties check what they return (``UsageError``).

    The ini file has those that the command line leaves out, and the configuration what both leave out. ``any`` says
    whether one of the first two is set at all: a configuration alone collects nothing.
    """

    def __init__(self, config: pytest.Config) -> None:
        typed = {name: config.getoption(f"kbit_{name}") for name in (*OPTIONS, "strict")}
        self._values = {name: value or config.getini(f"kbit_{name}") for name, value in typed.items()}
        self._folder, root = config.invocation_params.dir, config.rootpath

        def file(name: str) -> str:
            """A path, relative to where pytest was started, or in the ini file to the root directory."""
            return str((self._folder if typed[name] else root) / values[name]) if values[name] else ""

        values = self._values
        self.any = any(values.values())
        self.implementation = implementation_from(str(values["impl"] or ""), self._folder, root)
        self.suite, self.device = self._text("suite"), self._text("device")
        self.report, self._ledger_file = file("report"), file("ledger")

    @cached_property
    def configuration(self) -> Configuration:
        """The configuration of the directory where pytest was started."""
        from kbitcheck.run.configuration import read

        return read(self._folder)

    def _text(self, name: str) -> str:
        return str(self._values[name] or OPTIONS[name].default)

    def _several(self, name: str, key: str) -> tuple[Any, ...]:
        """A list: typed, else of the ini file, else of the configuration, which a suite that is named takes the place of."""
        if self._values[name]:
            return tuple(self._values[name])
        return () if self._values["suite"] and name != "select" else tuple(self.configuration.get(key, ()))

    def origins(self, *keys: str) -> str:
        """Which options, or keys of the configuration, have the values of these keys, in words; empty if none does."""
        from kbitcheck.run.configuration import origins

        names = {key: key.removesuffix("s") for key in keys}
        values = {key: (f"--kbit-{name}", self._several(name, key)) for key, name in names.items()}
        return origins(self.configuration, values)

    @property
    def strict(self) -> bool:
        """Whether a broken SHOULD counts."""
        return bool(self._values["strict"] or self.configuration.get("strict", False))

    @property
    def ignored(self) -> dict[str, str]:
        """The reason by ignored code or prefix."""
        return dict(self.configuration.get("ignore", {}))

    @property
    def models(self) -> tuple[str, ...]:
        """The models in place of the suite's."""
        return self._several("model", "models")

    @property
    def ledger_file(self) -> str:
        """The ledger that is named, or that the configuration has for this implementation."""
        own = self.configuration.ledger_of(self.implementation) if self.implementation else ""
        return self._ledger_file or (str(self._folder / own) if own else "")

    @cached_property
    def rules(self) -> list[Rule]:
        """The selected rules."""
        texts = self._several("select", "select")
        return select([code.strip() for text in texts for code in text.split(",") if code.strip()], self.ignored)

    @cached_property
    def timeout(self) -> float:
        """Seconds a case may take."""
        text = self._values["timeout"] or self.configuration.get("timeout") or OPTIONS["timeout"].default
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise UsageError(f"--kbit-timeout wants a number of seconds above 0, not {text!r}")
        return seconds

    @property
    def form(self) -> str:
        """The format of ``--kbit-report``."""
        form = FORMS.get(Path(self.report).suffix)
        if form is None:
            raise UsageError(f"--kbit-report {self.report}: the suffix names no format; use {', '.join(FORMS)}")
        return form

    @cached_property
    def specs(self) -> list[CaseSpec]:
        """The cases of ``--kbit-impl``; none without it."""
        if not self.implementation:
            return []
        from kbitcheck.core.machine import validate_device
        from kbitcheck.core.suggest import did_you_mean
        from kbitcheck.run import subject, suites

        profile = self._values["profile"] or self.configuration.get("profile")
        checkpointing = self._several("checkpointing", "checkpointing")
        for option, values, choices in (
            ("profile", [profile] * bool(profile), get_args(Profile)),
            ("checkpointing", checkpointing, get_args(Checkpointing)),
            ("suite", [self.suite], ("quick", "full")),
        ):
            for value in values:
                if value not in choices:
                    hint = did_you_mean(str(value), choices)
                    raise UsageError(f"no such --kbit-{option}: {value!r}{hint}; use {', '.join(choices)}")
        subject.validate(self.implementation)
        validate_device(self.device)
        return suites.cases(
            suites.suite_cells(self.suite),
            models=self.models,
            quants=self._several("quant", "quants"),
            checkpointing=checkpointing,
            implementation=self.implementation,
            profile=profile,
            device=self.device,
            adapters=self.configuration.get("adapters", "reference"),
        )

    @cached_property
    def ledger(self) -> Ledger | None:
        """The ledger of ``--kbit-ledger``, accepted under the same options; None without it."""
        if not self.ledger_file:
            return None
        from kbitcheck.compare import gate
        from kbitcheck.compare.ledger import Ledger, options_of

        if not self.specs:
            raise UsageError("--kbit-ledger needs --kbit-impl: a ledger is of one implementation")
        ledger = Ledger.read(self.ledger_file)
        gate.check_options(ledger, options_of(self.specs[0].as_json()))
        return ledger

    def check(self) -> None:
        """Raise a ``UsageError`` if any option is wrong, without torch."""
        _ = self.rules, self.timeout, self.specs, self.ledger
        if (self.specs or self._values["model"]) and self.models:
            from kbitcheck.models.sources.resolve import resolve

            for name in self.models:
                resolve(name)
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
