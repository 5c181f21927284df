"""The side of the plugin that receives the report of every test, wherever it ran: one summary, one exit status."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_CONFORMS, EXIT_USAGE, Report, exit_code
from kbitcheck.core.result import Result, Status
from kbitcheck.core.rule import rules
from kbitcheck.core.version import TOOL
from kbitcheck.pytest_plugin.options import Settings
from kbitcheck.pytest_plugin.plan import FOLDER, Plan

if TYPE_CHECKING:
    from kbitcheck.pytest_plugin.outcome import Outcome

STOPPED = "not run: the test session stopped early"
ENDED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)


class Controller:
    """Gathers the outcomes of tests. A planned cell without an outcome becomes an ERROR."""

    def __init__(self, settings: Settings, plan: Plan, folder: Path) -> None:
        self._settings, self._plan, self._folder = settings, plan, folder
        self._start = time.perf_counter()
        self._outcomes: dict[str, Outcome] = {}
        self._broken: dict[str, str] = {}
        self._failed: set[str] = set()  # tests that failed, other than by a rule that could not be judged
        self._usage = ""
        self._reports: list[Report] = []

    def pytest_report_header(self) -> str | None:
        """What is checked."""
        settings = self._settings
        if not settings.implementation:
            return None
        return f"{TOOL}: {settings.implementation}, {len(settings.specs)} cases, {len(settings.rules)} rules"

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Share the directory with xdist's workers."""
        node.workerinput[FOLDER] = str(self._folder)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Gather the outcome of a test, or why it gave none."""
        outcome = _outcome(report)
        if report.failed and not _is_error(outcome):
            self._failed.add(report.nodeid)
        if outcome is not None:
            self._usage = self._usage or outcome.usage
            if not outcome.usage:
                self._outcomes[report.nodeid] = outcome
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message.partition("\n")[0] if crash else report.longreprtext.strip().rpartition("\n")[2]
            self._broken.setdefault(report.nodeid, f"{report.when}: {why}".removeprefix("???: "))

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Show a rule that could not be judged as an error, not as a failure."""
        return ("error", "E", "ERROR") if report.failed and _is_error(_outcome(report)) else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Assemble the reports, write them, and decide the exit status."""
        if self._usage:
            session.exitstatus = EXIT_USAGE
            return
        plan = Plan.load(self._folder) or self._plan
        if not plan.cells or session.config.option.collectonly:
            return
        stopped = bool(session.shouldstop or session.shouldfail or exitstatus not in ENDED)
        missing = {
            nodeid: self._broken.get(nodeid) or (STOPPED if stopped else "no result: the test did not judge it")
            for nodeid in plan.cells
            if nodeid not in self._outcomes
        }
        self._reports = self._assembled(plan, missing)
        try:
            self._write()
        except UsageError as error:
            self._usage = str(error)
            session.exitstatus = EXIT_USAGE
            return
        if exitstatus not in ENDED:
            return
        code = exit_code(
            # What a ledger misses was no test; a planned test without a result is an error, and no failure.
            broken=any(report.broken for report in self._reports) or bool(self._failed - missing.keys()),
            not_judged=any(map(_errors, self._reports)),
            nothing=all(r.status is Status.SKIP for report in self._reports for r in report.results),
        )
        if code != EXIT_CONFORMS:
            session.exitstatus = code

    def _assembled(self, plan: Plan, missing: Mapping[str, str]) -> list[Report]:
        """One report for each implementation that was tested, with an error for each test in ``missing``."""
        from kbitcheck.pytest_plugin.reports import compared, reports

        settings = self._settings
        errors = []
        for nodeid, reason in missing.items():
            rule, case = plan.cells[nodeid]
            level = rules()[rule].level
            errors.append(Result(rule=rule, case=case or nodeid, level=level, status=Status.ERROR, reason=reason))
        assembled = reports(
            self._outcomes.values(),
            errors,
            {spec.id: spec for spec in settings.specs},
            settings.implementation,
            settings,
            complete=STOPPED not in missing.values(),
            seconds=time.perf_counter() - self._start,
        )
        return [compared(report, settings, left_out=plan.deselected) for report in assembled]

    def _write(self) -> None:
        """Write ``--kbit-report``; where several implementations were tested, one file each."""
        settings = self._settings
        if not settings.report:
            return
        from kbitcheck.report import render
        from kbitcheck.report.output_file import OutputFile

        for number, report in enumerate(self._reports, start=1):
            path = Path(settings.report)
            if number > 1:
                path = path.with_stem(f"{path.stem}.{number}")
            OutputFile(str(path), "--kbit-report").write(render(report, settings.form))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print each report, with ``-q`` its verdict alone."""
        if not self._usage and not self._reports:
            return
        from kbitcheck.report import render, verdict

        terminalreporter.section("kbitcheck")
        if self._usage:
            terminalreporter.write_line(f"wrong usage: {self._usage}", red=True)
            return
        for report in self._reports:
            if terminalreporter.config.get_verbosity() < 0:
                terminalreporter.write_line(verdict(report))
            else:
                terminalreporter.write(render(report, "text", terminal=terminalreporter.hasmarkup))

    def pytest_unconfigure(self) -> None:
        """Remove the shared directory."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _outcome(report: pytest.TestReport) -> Outcome | None:
    """The outcome that a test attached to its report; None for a test that judged no rule."""
    text = getattr(report, "kbit", None)
    if text is None:
        return None
    from kbitcheck.pytest_plugin.outcome import Outcome

    return Outcome.from_text(text)


def _is_error(outcome: Outcome | None) -> bool:
    """Whether a test reported wrong usage or a rule that could not be judged."""
    return outcome is not None and bool(outcome.usage or any(r.status is Status.ERROR for r in outcome.results))


def _errors(report: Report) -> bool:
    """Whether a rule could not be judged, other than by not being run, and the ledger does not accept it."""
    errors = [r for r in report.results if r.status is Status.ERROR and r.reason != STOPPED]
    return any(report.gate is None or report.counts(r) for r in errors)
