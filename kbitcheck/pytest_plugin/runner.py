"""The side of the plugin that collects and runs tests: in pytest itself, or in each of xdist's workers."""

from __future__ import annotations

import json
import sys
import tempfile
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from kbitcheck.core.errors import UsageError
from kbitcheck.core.events import Collector, Judged, Loaded
from kbitcheck.core.report import Report, assemble
from kbitcheck.core.result import Result, Status
from kbitcheck.core.rule import rules
from kbitcheck.pytest_plugin.options import Settings, given

if TYPE_CHECKING:
    from kbitcheck.core.cases import CaseSpec
    from kbitcheck.pytest_plugin.cases import Cases, Outcome

FOLDER = "kbit_folder"  # in xdist's workerinput
PLAN = "plan.json"
WIDTH = 100

TOLD = pytest.StashKey[str]()


def new_folder() -> Path:
    """A name for a test run's shared directory; nobody makes it before it is needed."""
    return Path(tempfile.gettempdir()) / f"kbitcheck-{uuid.uuid4().hex}"


class Runner:
    """Collects the tests of ``--kbit-impl``, plans which cases they need, and judges one rule on one case."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._input: Mapping[str, Any] = getattr(config, "workerinput", {})
        self.folder = Path(self._input[FOLDER]) if FOLDER in self._input else new_folder()
        self.active = given(config)
        self._unbound: tuple[str, ...] = ()
        self._bound: dict[CaseSpec, tuple[str, ...]] = {}
        # By node id: the rule, and the case where it is known before the test runs.
        self.plan: dict[str, tuple[str, str]] = {}
        self.deselected: list[tuple[str, str]] = []
        if self.active and not self._input:
            self.checked_settings()

    @cached_property
    def settings(self) -> Settings:
        """What the options say."""
        return Settings.read(self._config)

    def checked_settings(self) -> None:
        """Refuse wrong options before anything is collected.

        Raises:
            pytest.UsageError: one line that says what is wrong.
        """
        try:
            self.settings.check()
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None

    # Collection

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        if self.active and isinstance(collector, pytest.Session) and report.passed:
            report.result = [*report.result, *self._collectors(collector)]
        return report

    def _collectors(self, session: pytest.Session) -> Iterator[pytest.Collector]:
        from kbitcheck.pytest_plugin.items import CaseCollector

        settings = self.settings
        for spec in settings.specs:
            yield CaseCollector.from_parent(session, name=spec.id, spec=spec, rules=settings.rules, runner=self)

    def parametrize(self, metafunc: pytest.Metafunc) -> None:
        """Give a test function that requests ``kbit_check`` one parameter for each rule, and case of the options."""
        from kbitcheck.pytest_plugin.items import item_name

        self.active = True
        if any("kbit_check" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")):
            return  # kbitcheck.testing.parametrize did
        chosen = self.settings.rules
        if "kbit_option_case" not in metafunc.fixturenames:
            cells = [
                pytest.param(rule.code, id=f"{rule.code}-{rule.name}", marks=pytest.mark.kbit(rule=rule.code))
                for rule in chosen
            ]
            metafunc.parametrize("kbit_check", cells, indirect=True)
            return
        if not self.settings.specs:
            pytest.fail("kbit_check has no case: give --kbit-impl, or override the fixture kbit_case", pytrace=False)
        names = ("kbit_check", "kbit_option_case")
        pairs = [
            pytest.param(rule.code, spec, id=item_name(rule, spec), marks=pytest.mark.kbit(rule=rule.code))
            for spec in self.settings.specs
            for rule in chosen
        ]
        metafunc.parametrize(names, pairs, indirect=True)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        if self.active:
            found = [cell for cell in map(_cell, items) if cell]
            self.deselected += [(cell["rule"], cell["spec"].id) for cell in found if cell.get("spec")]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not self.active:
            return
        bound: dict[CaseSpec, dict[str, None]] = {}
        unbound: dict[str, None] = {}
        for item in session.items:
            cell = _cell(item)
            if cell is None:
                continue
            spec = cell.get("spec")
            (unbound if spec is None else bound.setdefault(spec, {}))[cell["rule"]] = None
            self.plan[item.nodeid] = (cell["rule"], "" if spec is None else spec.id)
        self._unbound = tuple(sorted(unbound))
        self._bound = {spec: tuple(sorted(codes)) for spec, codes in bound.items()}
        if self.plan and self._input:
            from kbitcheck.pytest_plugin.cases import write

            self.folder.mkdir(mode=0o700, exist_ok=True)
            write(self.folder / PLAN, {"plan": self.plan, "deselected": self.deselected})

    # Running

    @cached_property
    def _cases(self) -> Cases:
        from kbitcheck.pytest_plugin import devices
        from kbitcheck.pytest_plugin.cases import Cases, Job

        worker, device = self._input.get("workerid", ""), self.settings.device
        return Cases(
            self.folder,
            [Job(spec, codes) for spec, codes in self._bound.items()],
            timeout=self.settings.timeout,
            path=[entry for entry in sys.path if Path(entry).is_dir() and Path(entry).is_absolute()],
            environment=devices.own(worker, device, devices.visible()) if worker else None,
        )

    def check(self, item: pytest.Item, case: Any, code: str) -> None:
        """Judge one rule on one case and end the test accordingly: a fail, a skip, an xfail, or nothing."""
        from kbitcheck.pytest_plugin.cases import Job
        from kbitcheck.testing import as_spec

        spec = as_spec(case, self.settings)
        codes = self._bound.get(spec, ())
        job = Job(spec, codes if code in codes else self._unbound or (code,))
        outcome = self._cases.outcome(job)
        if outcome["usage"]:
            item.stash[TOLD] = json.dumps({"usage": outcome["usage"]})
            item.session.shouldfail = outcome["usage"]
            pytest.fail(outcome["usage"], pytrace=False)
        result = Result.from_json(outcome["results"][code])
        told = {key: outcome[key] for key in ("facts", "loaded")}
        item.stash[TOLD] = json.dumps({**told, "usage": "", "spec": spec.as_json(), "result": result.as_json()})
        self._tell(result, spec, outcome)

    def _tell(self, result: Result, spec: CaseSpec, outcome: Outcome) -> None:
        report = report_of(result, spec, Loaded(**outcome["loaded"]), strict=self.settings.strict)
        accepted = self.settings.accepted if spec.implementation == self.settings.implementation else None
        if accepted is not None:
            cell = (result.rule, result.case)
            report = accepted.judge_cell(report, cell)
            if report.gate and any(breach["counted"] for breach in report.gate["breaches"]):
                fail(report)
            if result.status in (Status.FAIL, Status.ERROR) and (reason := accepted.reason(cell)):
                pytest.xfail(f"accepted: {reason}")
        if result.status is Status.PASS:
            return
        if result.status is Status.SKIP:
            pytest.skip(result.reason)
        if report.counts(result) or (result.status is Status.ERROR and report.gate is None):
            fail(report)
        whose = result.attributed_to.value if result.attributed_to else "implementation"
        pytest.xfail(f"{rules()[result.rule].name} ({result.level.value}, the {whose}'s): told, not counted")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "call" and TOLD in item.stash:
            # What a report carries beyond its own attributes crosses from xdist's workers with it.
            vars(report)["kbit"] = item.stash[TOLD]
        return report

    def pytest_sessionfinish(self) -> None:
        if "_cases" in vars(self):
            self._cases.close()


def _cell(item: pytest.Item) -> Mapping[str, Any] | None:
    """The rule of a conformance test, and its case where that is known; None of any other test."""
    return next((mark.kwargs for mark in item.iter_markers("kbit") if "rule" in mark.kwargs), None)


def report_of(result: Result, spec: CaseSpec, loaded: Loaded, *, strict: bool) -> Report:
    """The report of a single result."""
    collector = Collector(loaded=loaded)
    collector.add(Judged(result=result))
    cases = {spec.id: spec.as_json()}
    return assemble(collector, cases, subject={"command": "impl", "ignored": {}}, strict=strict)


def fail(report: Report) -> NoReturn:
    """Fail a test with the report's own words, without a traceback."""
    from kbitcheck.compare.gate import Breach
    from kbitcheck.report.text import findings_only

    changes = [Breach.from_json(breach).line for breach in (report.gate or {"breaches": ()})["breaches"]]
    told = [*changes, findings_only(report, width=WIDTH)]
    pytest.fail("\n".join(filter(None, told)), pytrace=False)
