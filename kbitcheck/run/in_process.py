"""Judges in the process that calls: cases by name, a live model before its preparation, or one that is prepared."""

import contextlib
import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, get_args
from unittest import mock

from kbitcheck.core.cases import CaseSpec, Checkpointing, Freezes, Implementation, Profile
from kbitcheck.core.errors import UsageError, cause, short_of
from kbitcheck.core.events import Collector, Event, Judged, Loaded, Started
from kbitcheck.core.machine import LARGE_BYTES
from kbitcheck.core.report import Report, assemble
from kbitcheck.core.result import Status
from kbitcheck.core.rule import Rule, select
from kbitcheck.core.training import Training
from kbitcheck.run import subject as implementations
from kbitcheck.run.beside_reference import settled
from kbitcheck.run.examine import examine, judging, not_reached
from kbitcheck.run.findings import settler
from kbitcheck.run.notebook_progress import notebook_progress
from kbitcheck.run.pool import Worker
from kbitcheck.run.worker_process import scratch_directory

REFERENCE_SECONDS = 600.0


@contextlib.contextmanager
def like_a_worker() -> Iterator[Callable[[int], None]]:
    """The settings of a worker process, for a while: one thread, no compiler.

    Yields a function that takes the bytes of a model and gives a large one all threads. The probes' own warnings are
    not shown, and what libraries log is shown once; rules see all of it.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.compiler.set_stance("force_eager"), _logged_once(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield lambda nbytes: torch.set_num_threads(threads if nbytes > LARGE_BYTES else 1)
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _logged_once() -> Iterator[None]:
    """While it is open, what a logger says again is not shown again: a layer may log the same in each of hundreds of forwards."""
    own, shown = logging.Logger.callHandlers, set[tuple[str, str]]()

    def handle(logger: logging.Logger, record: logging.LogRecord) -> None:
        said = (record.name, str(record.msg))
        if said not in shown:
            shown.add(said)
            own(logger, record)

    with mock.patch.object(logging.Logger, "callHandlers", handle):
        yield


def examine_all(
    specs: Sequence[CaseSpec],
    rules: Sequence[Rule],
    implementation: Implementation | None,
    tell: Callable[[Event], object],
    *,
    beside_reference: bool = False,
) -> Generator[Event, None, None]:
    """The events of the cases; ``implementation`` replaces the one that the specs name. ``tell`` gets those of progress.

    With ``beside_reference`` the reference is asked, in a process of its own, about what could not be judged.
    """
    from kbitcheck.observe import device as devices
    from kbitcheck.observe.open_case import open_case
    from kbitcheck.observe.probes import files_written

    files_written.watch()
    device = devices.resolve_device(specs[0].device)
    static = specs[0].static == "always"
    loaded = implementation or (implementations.unused if static else implementations.load)(specs[0].implementation)
    yield Loaded(implementation=loaded.as_json(), environment=devices.describe(device, specs[0].seed))
    for spec in specs:
        if not (judged := judging(spec, rules)):
            continue
        yield Started(case=spec.id)
        events: list[Event] = []
        try:
            placed = spec if spec.static == "always" else dataclasses.replace(spec, device=device)
            with like_a_worker() as size_threads:
                case = open_case(placed, loaded, rules=judged)
                size_threads(case.base.nbytes)
                events.extend(examine(case, judged, tell=tell))
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            reached = {event.result.rule for event in events if isinstance(event, Judged)}
            events += not_reached(spec, judged, reached, cause(error), short_of(error))
        yield from events if not beside_reference else _beside_reference(spec, judged, events)


def _beside_reference(spec: CaseSpec, rules: Sequence[Rule], events: Sequence[Event]) -> Iterator[Event]:
    errors = [event for event in events if isinstance(event, Judged) and event.result.status is Status.ERROR]
    yield from (event for event in events if event not in errors)
    if errors:
        with scratch_directory() as scratch, contextlib.closing(Worker(scratch, REFERENCE_SECONDS)) as worker:
            yield from settled(
                spec, rules, errors, lambda of_reference, named, share: worker.examine(of_reference, named)
            )


def audit(
    model: Any,
    prepare: str | Callable[..., Any],
    training: Training,
    *,
    select_codes: Sequence[str],
    ignore: Mapping[str, str],
    strict: bool,
    allow_step: bool | None,
    options: Mapping[str, Any],
) -> Report:
    """The report of ``kbitcheck.audit``."""
    from kbitcheck.observe import device as devices
    from kbitcheck.observe import lent
    from kbitcheck.observe.open_case import open_live
    from kbitcheck.observe.watch.own_steps import trained_by

    model, training = trained_by(model, training)
    if not callable(getattr(model, "parameters", None)):
        raise UsageError(f"not a model: {model!r}; a name is for `kbitcheck model`")
    rules = select(select_codes, ignore)
    model = lent.unwrapped(model)
    if isinstance(prepare, str):
        implementation = implementations.load(prepare or implementations.default())
    else:
        implementation = implementations.describe(prepare)
    start = time.perf_counter()
    no_step = lent.why_no_step(model, allow_step=allow_step)
    with lent.lending(model) as restore, like_a_worker() as size_threads:
        settings = {"profile": "auto", **options}
        case = open_live(model, training, implementation=implementation, restore=restore, no_step=no_step, **settings)
        size_threads(case.base.nbytes)
        device = str(next(model.parameters()).device)
        loaded = Loaded(implementation=implementation.as_json(), environment=devices.describe(device, case.spec.seed))
        subject = {"command": "audit", "ignored": dict(ignore)}
        collector = Collector(settler([case.spec]), loaded=loaded)
        return _report(collector, case, rules, start, subject=subject, blame="any", strict=strict)


def assert_prepared(
    model: Any,
    training: Training,
    *,
    profile: Profile,
    freezes: Freezes,
    checkpointing: Checkpointing | None,
    strict: bool,
    select_codes: Sequence[str],
    ignore: Mapping[str, str],
    allow_step: bool | None,
) -> Report:
    """The report of ``kbitcheck.assert_prepared``."""
    import torch

    from kbitcheck.models.sources.live import LiveModel
    from kbitcheck.observe import device as devices
    from kbitcheck.observe import lent, prepared
    from kbitcheck.observe.probes import switches
    from kbitcheck.observe.watch.own_steps import trained_by

    for name, value, choices in (
        ("profile", profile, get_args(Profile)),
        ("freezes", freezes, get_args(Freezes)),
        ("checkpointing", checkpointing, (None, *get_args(Checkpointing))),
    ):
        if value not in choices:
            raise UsageError(f"no such {name}: {value!r}; use {', '.join(map(str, choices))}")
    rules = select(select_codes, ignore)
    model, training = trained_by(model, training)
    model = lent.unwrapped(model)
    source = LiveModel.of(model)
    spec = CaseSpec(
        model=source.name,
        quant=source.quant,
        implementation="",
        profile=profile,
        freezes=freezes,
        checkpointing=checkpointing or switches.mode_of(model),
        device=str(next(model.parameters()).device),
    )
    start = time.perf_counter()
    small = sum(p.nbytes for p in model.parameters()) < LARGE_BYTES
    environment = devices.describe(spec.device, spec.seed)
    with (
        prepared.undisturbed(threads=1 if small else torch.get_num_threads()),
        torch.enable_grad(),
        lent.lending(model) as restore,
    ):
        no_step = lent.why_no_step(model, allow_step=allow_step)
        case = prepared.PreparedCase(spec, model, training, restore=restore, no_step=no_step)
        loaded = Loaded(implementation={"name": "your code"}, environment=environment)
        subject = {"command": "assert_prepared", "ignored": dict(ignore)}
        return _report(Collector(loaded=loaded), case, rules, start, subject=subject, blame="own", strict=strict)


def _report(collector: Collector, case: Any, rules: Sequence[Rule], start: float, **options: Any) -> Report:
    with notebook_progress(len(rules)) as advance:
        for event in examine(case, rules, tell=advance):
            advance(collector.add(event))
    seconds = time.perf_counter() - start
    return assemble(collector, {case.case: case.spec.as_json()}, in_process=True, seconds=seconds, **options)
