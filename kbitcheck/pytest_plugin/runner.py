"""The side of the plugin that collects and runs tests: in pytest itself, or in each of xdist's workers."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import Report
from kbitcheck.core.result import Result, Status
from kbitcheck.pytest_plugin.options import Settings
from kbitcheck.pytest_plugin.plan import Plan, shared_folder

if TYPE_CHECKING:
    from kbitcheck.pytest_plugin.cases import Cases
    from kbitcheck.pytest_plugin.outcome import Outcome

WIDTH = 100

OUTCOME = pytest.StashKey[str]()  # of an item: its outcome as text


class Runner:
    """Collects the tests of ``--kbit-impl``, plans which cases they need, and judges one rule on one case."""

    def __init__(self, config: pytest.Config) -> None:
        self._workerinput: Mapping[str, Any] = getattr(config, "workerinput", {})
        self.folder = shared_folder(self._workerinput)
        self.settings = Settings(config)
        self.active = self.settings.any
        self.plan = Plan()
        # The rules that judge a case in tests which name it, and the rules of tests whose case a fixture decides.
        self._rules_by_case: dict[CaseSpec, tuple[str, ...]] = {}
        self._other_rules: tuple[str, ...] = ()
        self._usage = ""
        if self.active and not self._workerinput:
            try:
                self.settings.check()
            except UsageError as error:
                raise pytest.UsageError(str(error)) from None

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Add the cases of ``--kbit-impl`` to the session's own collectors."""
        report = yield
        if self.active and isinstance(collector, pytest.Session) and report.passed:
            from kbitcheck.pytest_plugin.items import CaseCollector

            rules = self.settings.rules
            for spec in self.settings.specs:
                report.result.append(CaseCollector.from_parent(collector, spec=spec, rules=rules, check=self.check))
        return report

    def parametrize(self, metafunc: pytest.Metafunc) -> None:
        """Give a test function that requests ``kbit_check`` one parameter for each rule, and case of the options."""
        from kbitcheck.pytest_plugin.specs import item_name

        self.active = True
        if any("kbit_check" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")):
            return  # kbitcheck.testing.parametrize did
        try:
            rules = self.settings.rules
        except UsageError as error:  # of a configuration, which is read where a test wants it
            self._usage = str(error)
            return
        if "kbit_option_case" not in metafunc.fixturenames:
            marks = {rule: pytest.mark.kbit(rule=rule.code) for rule in rules}
            cells = [pytest.param(r.code, id=f"{r.code}-{r.name}", marks=mark) for r, mark in marks.items()]
            metafunc.parametrize("kbit_check", cells, indirect=True)
            return
        if not self.settings.specs:
            pytest.fail("kbit_check has no case: give --kbit-impl, or override the fixture kbit_case", pytrace=False)
        pairs = [
            pytest.param(rule.code, spec, id=item_name(rule, spec), marks=pytest.mark.kbit(rule=rule.code))
            for spec in self.settings.specs
            for rule in rules
        ]
        metafunc.parametrize(("kbit_check", "kbit_option_case"), pairs, indirect=True)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Note which cells are left out."""
        marks = [mark for mark in map(_mark, items) if mark] if self.active else []
        self.plan.deselected += [(mark["rule"], mark["spec"].id) for mark in marks if mark.get("spec")]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Plan which rules judge each case, so that a case is judged once by all of them."""
        if not self.active:
            return
        if self._usage:
            raise pytest.UsageError(self._usage)
        by_case: dict[CaseSpec, set[str]] = {}
        others: set[str] = set()
        for item in session.items:
            mark = _mark(item)
            if mark is None:
                continue
            spec = mark.get("spec")
            (others if spec is None else by_case.setdefault(spec, set())).add(mark["rule"])
            self.plan.cells[item.nodeid] = mark["rule"], "" if spec is None else spec.id
        self._other_rules = tuple(sorted(others))
        self._rules_by_case = {spec: tuple(sorted(codes)) for spec, codes in by_case.items()}
        if self.plan.cells and self._workerinput:
            self.plan.save(self.folder)

    @cached_property
    def _cases(self) -> Cases:
        from kbitcheck.pytest_plugin import devices
        from kbitcheck.pytest_plugin.cases import Cases, Job

        worker, device = self._workerinput.get("workerid", ""), self.settings.device
        return Cases(
            self.folder,
            [Job(spec, codes) for spec, codes in self._rules_by_case.items()],
            timeout=self.settings.timeout,
            path=[entry for entry in sys.path if Path(entry).is_dir() and Path(entry).is_absolute()],
            environment=devices.environment_of(worker, device, devices.visible()) if worker else {},
        )

    def check(self, item: pytest.Item, case: Any, code: str) -> None:
        """Judge one rule on one case and end the test accordingly: a fail, a skip, an xfail, or nothing."""
        from kbitcheck.pytest_plugin.cases import Job
        from kbitcheck.pytest_plugin.specs import as_spec

        settings = self.settings
        spec = as_spec(case, implementation=settings.implementation, device=settings.device)
        codes = self._rules_by_case.get(spec, ())
        outcome = self._cases.outcome(Job(spec, codes if code in codes else self._other_rules or (code,))).of(code)
        item.stash[OUTCOME] = outcome.to_text()
        if outcome.usage:
            item.session.shouldfail = outcome.usage
            pytest.fail(outcome.usage, pytrace=False)
        [result] = outcome.results
        self._end_test(result, outcome)

    def _end_test(self, result: Result, outcome: Outcome) -> None:
        from kbitcheck.pytest_plugin.reports import compared, reports

        [report] = reports([outcome], [], {}, "", self.settings)
        report = compared(report, self.settings, cell=(result.rule, result.case))
        if report.gate is not None:
            if any(breach["counted"] for breach in report.gate["breaches"]):
                fail(report)
            entries = (e for e in report.gate["accepted"] if e["rule"] == result.rule and result.case in e["cases"])
            reason = next((entry["reason"] for entry in entries), "")
            if reason and result.status in (Status.FAIL, Status.ERROR):
                pytest.xfail(f"accepted: {reason}")
        if result.status is Status.PASS:
            return
        if result.status is Status.SKIP:
            pytest.skip(result.reason)
        if report.counts(result) or (result.status is Status.ERROR and report.gate is None):
            fail(report)
        pytest.xfail(not_counted(result))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach the outcome to the test's report, which crosses from xdist's workers."""
        report = yield
        if call.when == "call" and OUTCOME in item.stash:
            vars(report)["kbit"] = item.stash[OUTCOME]
        return report

    def pytest_sessionfinish(self) -> None:
        """End the worker, where one was started."""
        if "_cases" in vars(self):
            self._cases.close()


def _mark(item: pytest.Item) -> Mapping[str, Any] | None:
    """The rule of a conformance test, and its case where a test names it; None for any other test."""
    return next((mark.kwargs for mark in item.iter_markers("kbit") if "rule" in mark.kwargs), None)


def not_counted(result: Result) -> str:
    """Why a failure does not fail the test."""
    from kbitcheck.core.rule import rules

    party = result.attributed_to.value if result.attributed_to else "implementation"
    return f"{rules()[result.rule].name} ({result.level.value}, attributed to the {party}): reported, not counted"


def fail(report: Report) -> NoReturn:
    """Fail a test with the text of the report, without a traceback."""
    from kbitcheck.compare.gate import breaches
    from kbitcheck.report.text import failures

    changes = [breach.line for breach in breaches(report)]
    pytest.fail("\n".join(filter(None, [*changes, failures(report, width=WIDTH)])), pytrace=False)
