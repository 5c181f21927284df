"""The plugin's options: on the command line, or under the same names in the ini file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import pytest

from kbitcheck.core.errors import UsageError
from kbitcheck.core.rule import Rule, select

if TYPE_CHECKING:
    from kbitcheck.core.cases import CaseSpec, Checkpointing
    from kbitcheck.pytest_plugin.accepted import Accepted

# Name: metavar, default, whether it is repeatable, help.
OPTIONS: dict[str, tuple[str, str, bool, str]] = {
    "impl": (
        "IMPL",
        "",
        False,
        "Collect conformance tests of this preparation: module:function, file.py:function, peft.",
    ),
    "model": ("MODEL", "", True, "Instead of the suite's models; repeatable."),
    "quant": ("Q", "", True, "nf4, fp4 or int8, with options as in `kbitcheck impl --quant`; repeatable."),
    "checkpointing": ("MODE", "", True, "reentrant, non-reentrant, default or off; repeatable."),
    "profile": ("PROFILE", "peft", False, "The recipe of dtypes that is promised: peft, qlora or frozen-half."),
    "select": ("CODES", "", True, "Only these rules; prefixes (KB3) too; repeatable."),
    "suite": ("SUITE", "quick", False, "quick or full."),
    "timeout": ("SECONDS", "600", False, "Time limit of one case."),
    "device": ("DEVICE", "auto", False, "auto, cpu, cuda, cuda:1, ..."),
    "report": (
        "FILE",
        "",
        False,
        "Write the report here; the suffix says how (.json, .txt, .xml, .sarif, .md, .html).",
    ),
    "ledger": ("FILE", "", False, "Compare with the accepted results in this ledger."),
}
STRICT = "Count a broken SHOULD as well."
FORMS = {
    ".json": "json", ".txt": "text", ".xml": "junit", ".sarif": "sarif", ".md": "markdown", ".html": "html",
}  # fmt: skip


def declare(parser: pytest.Parser) -> None:
    """Add the options and their ini keys, all text, so that they cross to xdist's workers."""
    group = parser.getgroup("kbitcheck", "conformance of k-bit preparation")
    for name, (metavar, default, repeatable, text) in OPTIONS.items():
        shown = f"{text} [{default}]" if default else text
        action = "append" if repeatable else "store"
        group.addoption(f"--kbit-{name}", dest=f"kbit_{name}", action=action, metavar=metavar, default=None, help=shown)
        if repeatable:
            parser.addini(f"kbit_{name}", f"--kbit-{name}", "linelist", [])
        else:
            parser.addini(f"kbit_{name}", f"--kbit-{name}", "string", "")
    group.addoption("--kbit-strict", dest="kbit_strict", action="store_true", default=None, help=STRICT)
    parser.addini("kbit_strict", "--kbit-strict", "bool", False)


@dataclass(frozen=True)
class Settings:
    """What the options say, each as typed; properties check what they return."""

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
        """The options of this run; what the command line leaves out is the ini file's."""
        base = config.invocation_params.dir

        def text(name: str) -> str:
            return str(config.getoption(f"kbit_{name}") or config.getini(f"kbit_{name}") or OPTIONS[name][1])

        def texts(name: str) -> tuple[str, ...]:
            return tuple(config.getoption(f"kbit_{name}") or config.getini(f"kbit_{name}"))

        def file(name: str) -> str:
            """A path as given from where pytest was started, or in the ini file from the root directory."""
            given = config.getoption(f"kbit_{name}")
            return str(base / given if given else config.rootpath / text(name)) if text(name) else ""

        return cls(
            implementation=located(text("impl"), base, config.rootpath),
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
        """The cases of ``--kbit-impl``; none where it was not given.

        Raises:
            UsageError: an option is wrong.
        """
        if not self.implementation:
            return []
        from kbitcheck.core import machine as environment
        from kbitcheck.core.cases import Checkpointing, Profile
        from kbitcheck.run import subject as implementations
        from kbitcheck.run import suites as suite

        for option, given, known in (
            ("profile", (self.profile,), get_args(Profile)),
            ("checkpointing", self.checkpointing, get_args(Checkpointing)),
            ("suite", (self.suite,), ("quick", "full")),
        ):
            for value in given:
                if value not in known:
                    raise UsageError(f"no such --kbit-{option}: {value!r}; use {', '.join(known)}")
        implementations.validate(self.implementation)
        environment.validate_device(self.device)
        return suite.cases(
            suite.FULL if self.suite == "full" else suite.QUICK,
            models=self.models,
            quants=self.quants,
            checkpointing=cast("tuple[Checkpointing, ...]", self.checkpointing),
            implementation=self.implementation,
            profile=self.profile,
            device=self.device,
        )

    @cached_property
    def accepted(self) -> Accepted | None:
        """What the ledger accepts; None where there is no ``--kbit-ledger``.

        Raises:
            UsageError: it is missing, malformed, or was accepted under other options.
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
        """Check, without torch, all that was given.

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


def located(implementation: str, *directories: Path) -> str:
    """The implementation with its file, if it names one, as seen from the working directory.

    A relative file is looked for in each of ``directories``.
    """
    where, _, attribute = implementation.rpartition(":")
    if where.endswith(".py") and not Path(where).is_file():
        for directory in directories:
            if (directory / where).is_file():
                return f"{os.path.relpath(directory / where)}:{attribute}"
    return implementation


def given(config: pytest.Config) -> bool:
    """Whether any of the options was given."""
    names = (*OPTIONS, "strict")
    found: list[Any] = [config.getoption(f"kbit_{n}") or config.getini(f"kbit_{n}") for n in names]
    return any(found)
