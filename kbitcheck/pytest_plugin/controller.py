"""The side of the plugin that hears of every test, wherever it ran: one summary, one report, the exit status."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kbitcheck.core.errors import UsageError
from kbitcheck.core.events import Collector, Loaded
from kbitcheck.core.report import EXIT_CONFORMS, EXIT_USAGE, Report, assemble, exit_code
from kbitcheck.core.result import Result, Status
from kbitcheck.core.rule import rules
from kbitcheck.core.version import TOOL
from kbitcheck.pytest_plugin.runner import FOLDER, PLAN, Runner

STOPPED = "not run: the test session stopped early"
UNFINISHED = {pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR}
ENDED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)


@dataclass
class _Group:
    """What the report of one implementation is assembled from: results by case and rule, and the cases themselves."""

    collector: Collector = field(default_factory=Collector)
    results: dict[tuple[str, str], Result] = field(default_factory=dict)
    cases: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def report(self, **options: Any) -> Report:
        """The report, as ``kbitcheck impl`` makes it; cases and rules are sorted."""
        self.collector.results = [self.results[key] for key in sorted(self.results)]
        cases = {case: self.cases[case] for case in sorted(self.cases)}
        return assemble(self.collector, cases, subject={"command": "impl", "ignored": {}}, **options)


class Controller:
    """Gathers what tests reported. A cell that was planned and not reported becomes an ERROR."""

    def __init__(self, config: pytest.Config, runner: Runner) -> None:
        self._config, self._runner = config, runner
        self._start = time.perf_counter()
        self._told: dict[str, dict[str, Any]] = {}
        self._broken: dict[str, str] = {}
        self._failed: set[str] = set()  # tests that failed, other than by a rule that could not be judged
        self._usage = ""
        self._reports: list[Report] = []

    def pytest_report_header(self) -> str | None:
        settings = self._runner.settings if self._runner.active else None
        if settings is None or not settings.implementation:
            return None
        cases, chosen = len(settings.specs), len(settings.rules)
        return f"{TOOL}: {settings.implementation}, {cases} cases, {chosen} rules"

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput[FOLDER] = str(self._runner.folder)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = getattr(report, "kbit", None)
        if report.failed and not _is_error(told):
            self._failed.add(report.nodeid)
        if told is not None:
            found = json.loads(told)
            self._usage = self._usage or found["usage"]
            if not found["usage"]:
                self._told[report.nodeid] = found
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message.partition("\n")[0] if crash else report.longreprtext.strip().rpartition("\n")[2]
            self._broken.setdefault(report.nodeid, f"{report.when}: {why}".removeprefix("???: "))

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        told = getattr(report, "kbit", None)
        return ("error", "E", "ERROR") if report.failed and _is_error(told) else None

    def _plan(self) -> tuple[Mapping[str, tuple[str, str]], list[tuple[str, str]]]:
        """What was to be run, by node id: rule and case; and what was deselected.

        Under xdist a worker left it in the shared directory.
        """
        try:
            plan: dict[str, Any] = json.loads((self._runner.folder / PLAN).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return self._runner.plan, self._runner.deselected
        return (
            {nodeid: (rule, case) for nodeid, (rule, case) in plan["plan"].items()},
            [(rule, case) for rule, case in plan["deselected"]],
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self._usage:
            session.exitstatus = EXIT_USAGE
            return
        plan, deselected = self._plan()
        if not plan or session.config.option.collectonly:
            return
        stopped = bool(session.shouldstop or session.shouldfail or exitstatus in UNFINISHED)
        missing = {
            nodeid: self._broken.get(nodeid) or (STOPPED if stopped else "no result: the test did not judge it")
            for nodeid in plan
            if nodeid not in self._told
        }
        self._reports = self._assembled(plan, missing, complete=not (stopped and STOPPED in missing.values()))
        settings = self._runner.settings
        if settings.accepted is not None:
            self._reports = [
                settings.accepted.judge(report, deselected) if _of(report, settings.implementation) else report
                for report in self._reports
            ]
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

    def _assembled(
        self, plan: Mapping[str, tuple[str, str]], missing: Mapping[str, str], *, complete: bool
    ) -> list[Report]:
        """One report for each implementation that was tested."""
        settings = self._runner.settings
        planned = {spec.id: spec for spec in settings.specs}
        groups: dict[str, _Group] = {}

        def group_of(implementation: str) -> _Group:
            if implementation not in groups:
                groups[implementation] = _Group(Collector(loaded=Loaded(implementation={"name": implementation})))
            return groups[implementation]

        for told in self._told.values():
            group, result = group_of(told["spec"]["implementation"]), Result.from_json(told["result"])
            group.results[result.case, result.rule] = result
            group.cases[result.case] = told["spec"]
            if told["loaded"]:
                group.collector.loaded = Loaded(**told["loaded"])
            if told["facts"]:
                group.collector.facts[result.case] = told["facts"]
        for nodeid, why in missing.items():
            rule, case = plan[nodeid]
            group = group_of(
                settings.implementation if case in planned else next(iter(groups), settings.implementation)
            )
            case = case or nodeid
            if case in planned:
                group.cases[case] = planned[case].as_json()
            error = Result(rule=rule, case=case, level=rules()[rule].level, status=Status.ERROR, reason=why)
            group.results.setdefault((case, rule), error)
        seconds = time.perf_counter() - self._start
        return [g.report(seconds=seconds, strict=settings.strict, complete=complete) for g in groups.values()]

    def _write(self) -> None:
        """Write ``--kbit-report``; where several implementations were tested, one file each.

        Raises:
            UsageError: it cannot be written, or not in this format.
        """
        settings = self._runner.settings
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
        if not self._usage and not self._reports:
            return
        from kbitcheck.report import render, verdict

        terminalreporter.section("kbitcheck")
        if self._usage:
            terminalreporter.write_line(f"wrong usage: {self._usage}", red=True)
            return
        for report in self._reports:
            if self._config.get_verbosity() < 0:
                terminalreporter.write_line(verdict(report))
            else:
                terminalreporter.write(render(report, "text", terminal=terminalreporter.hasmarkup))

    def pytest_unconfigure(self) -> None:
        shutil.rmtree(self._runner.folder, ignore_errors=True)


def _of(report: Report, implementation: str) -> bool:
    """Whether a report is of this implementation."""
    return {spec["implementation"] for spec in report.subject.get("cases", {}).values()} == {implementation}


def _errors(report: Report) -> bool:
    """Whether a check broke, other than by not being run, and the ledger does not accept it."""
    errors = [r for r in report.results if r.status is Status.ERROR and r.reason != STOPPED]
    return any(report.gate is None or report.counts(r) for r in errors)


def _is_error(told: str | None) -> bool:
    """Whether what a test reported (None: nothing) is a rule that could not be judged."""
    return told is not None and json.loads(told).get("result", {"status": Status.ERROR})["status"] == Status.ERROR
