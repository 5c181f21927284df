"""Judges a user's own training while it runs, in its process."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, Self

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError, cause
from kbitcheck.core.events import Collector, Loaded
from kbitcheck.core.report import EXIT_CONFORMS, NonConformance, Report, assemble
from kbitcheck.core.result import Status
from kbitcheck.core.training import Training
from kbitcheck.run.examine import examine, not_reached
from kbitcheck.run.watch_settings import Settings

FLATTENED = (
    "FullyShardedDataParallel keeps packed weights and adapters as parts of flat tensors: nothing of the run is judged; with fully_shard "
    "(FSDP2) dtypes, flags, labels, losses and the optimizer's steps are"
)


class Watch:
    """The context that ``kbitcheck.watch`` returns: it watches while it is entered, and has the ``report`` afterwards."""

    def __init__(self, model: Any, optimizer: Any, settings: Settings, **options: Any) -> None:
        from kbitcheck.models.sources.live import LiveModel
        from kbitcheck.observe import internals, lent
        from kbitcheck.observe.meant_to_train import require_declared
        from kbitcheck.observe.watch.observer import Observer
        from kbitcheck.observe.watch.replicas import wrap_of

        settings.validate()
        if not callable(getattr(model, "named_modules", None)):
            raise UsageError(f"not a model: {model!r}")
        if internals.is_flattened(model):
            raise UsageError(FLATTENED)
        inner = lent.unwrapped(model)
        _ = LiveModel.of(inner).quant  # a UsageError where nothing is quantized
        self._settings = settings
        self._start = time.perf_counter()
        self._report: Report | None = None
        training = Training(trains=settings.trains, optimizer=optimizer, steps=settings.steps)
        require_declared(inner, training)
        self._observer = Observer(inner, training, wrap=wrap_of(model), **options)

    def __enter__(self) -> Self:
        self._observer.start()
        return self

    def start(self, keywords: Mapping[str, Any], module: Any, arguments: Any) -> None:
        """Start inside the call of a module, whose own hooks are called no more: its arguments are passed here."""
        self._observer.start()
        if module is self._observer.model:
            self._observer.begin(module, arguments, keywords)

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take everything off the model and judge what was seen."""
        self._observer.stop()
        _ = self.report

    def has(self, module: Any) -> bool:
        """Whether a module is the watched model, a part of it, or what it is wrapped in."""
        model = self._observer.model
        return any(each is module for each in model.modules()) or any(each is model for each in module.modules())

    @property
    def over(self) -> bool:
        """Whether nothing is watched any more."""
        return bool(self._observer.over)

    @property
    def replicas(self) -> list[dict[str, Any]]:
        """What this process of several holds, as data: one (``Replica``), or none."""
        return [replica.as_json() for replica in self._observer.run.replicas]

    @property
    def report(self) -> Report:
        """The report of the steps that were watched; what is still to come is not in it."""
        if self._report is not None:
            return self._report
        report = report_of(self._observer, self._settings, seconds=time.perf_counter() - self._start)
        if self.over:
            self._report = report
        return report

    def raise_for_failures(self) -> None:
        """Raise ``NonConformance`` unless the run conforms."""
        if self.report.exit_code != EXIT_CONFORMS:
            raise NonConformance(self.report, str(self.report))

    def __str__(self) -> str:
        return str(self.report)


def report_of(observer: Any, settings: Settings, *, seconds: float) -> Report:
    """The report of what was watched. Where the watcher failed, every rule is an ERROR with the reason."""
    from kbitcheck.observe import device as devices
    from kbitcheck.observe.watch.case import WatchedCase

    place = next((str(p.device) for p in observer.model.parameters()), "cpu")
    loaded = Loaded(implementation={"name": "your code"}, environment=devices.describe(place, 0))
    collector = Collector(loaded=loaded)
    rules, case = settings.rules, None
    failed = observer.failed
    try:
        if observer.before is not None and not failed:
            case = WatchedCase(observer, profile=settings.profile, case=settings.case)
            for event in examine(case, rules):
                collector.add(event)
    except Exception as error:
        failed = cause(error)
    spec = CaseSpec(model=settings.case, quant="", implementation="") if case is None else case.spec
    if failed:
        collector = Collector(loaded=loaded)
        for each in not_reached(spec, rules, (), f"the watcher failed: {failed}"):
            collector.add(each)
    elif not observer.run.steps and not any(r.status is Status.FAIL for r in collector.results):
        collector.results.clear()  # dtypes and flags alone are no run
    name = settings.case if case is not None and not failed else spec.id
    return assemble(
        collector,
        {name: spec.as_json()},
        subject={"command": "watch", "ignored": dict(settings.ignore), "steps": len(observer.run.steps), **_ranks()},
        in_process=True,
        strict=settings.strict,
        seconds=seconds,
    )


def _ranks() -> dict[str, int]:
    """How many processes train, where torchrun or a launcher like it started them."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return {"ranks": ranks} if ranks > 1 else {}
