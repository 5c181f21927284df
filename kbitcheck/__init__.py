"""Conformance tests for the preparation of quantized models for k-bit training.

``audit`` judges a live model, ``assert_prepared`` one that is prepared already, ``check_implementation`` a preparation
function; importing this imports no torch.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kbitcheck.core.cases import Checkpointing, Freezes, Profile
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import NonConformance, Report, register_renderer
from kbitcheck.core.rule import REGISTRY
from kbitcheck.core.training import STEPS, Training
from kbitcheck.core.version import VERSION

if TYPE_CHECKING:
    from kbitcheck.run.watch import Watch

__all__ = [
    "NonConformance", "Report", "UsageError", "__version__", "assert_prepared", "audit", "check_implementation", "watch",
]  # fmt: skip

__version__ = VERSION


def _rendered(report: Report, form: str) -> str:
    from kbitcheck.report import render

    return render(report, form)


REGISTRY.load_on_demand("kbitcheck.judge")
register_renderer(_rendered)


def audit(
    model: Any,
    *,
    prepare: str | Callable[..., Any] = "",
    select: Sequence[str] = (),
    ignore: Mapping[str, str] | None = None,
    strict: bool = False,
    batch: Mapping[str, Any] | int | None = None,
    loss: Callable[[Any], Any] | None = None,
    trains: Sequence[str] = (),
    optimizer: Any = None,
    allow_step: bool | None = None,
    **options: Any,
) -> Report:
    """Audit a live quantized model in this process, as ``kbitcheck model`` audits a named one.

    The model itself is prepared and takes training steps; afterwards it is bitwise what it was, also after an exception.
    ``allow_step=False`` forbids steps; the report then says what was not judged. ``prepare`` is the preparation to use
    (peft where it is installed, else the reference); ``ignore`` maps rule codes or prefixes to the reason why they are
    left out; ``options`` are those of ``kbitcheck.extend.CaseSpec``. The default profile is ``auto``, which also reads
    off whether the preparation freezes the base: see ``assert_prepared``.

    ``batch`` (keyword arguments of the forward, or a number of rows to draw), ``loss`` and ``trains`` say how the model
    trains, as in ``assert_prepared``; what ``trains`` names is thawed when adapters are attached. An optimizer
    of the kind and the options of ``optimizer`` takes two steps of what then trains (KB313, KB710 to KB715). A ``Trainer`` in
    place of ``model`` brings its model and its optimizer.

    Raises:
        UsageError: an option, rule or implementation is wrong, or the model is not quantized.
    """
    from kbitcheck.run import in_process

    drawn = {"batch": batch} if isinstance(batch, int) else {}
    own = None if isinstance(batch, int) else batch
    return in_process.audit(
        model,
        prepare,
        Training(batch=own, loss=loss, trains=tuple(trains), optimizer=optimizer),
        select_codes=select,
        ignore=ignore or {},
        strict=strict,
        allow_step=allow_step,
        options={**drawn, **options},
    )


def check_implementation(
    prepare: str | Callable[..., Any],
    *,
    models: Sequence[str] = (),
    quants: Sequence[str] = (),
    checkpointing: Sequence[Checkpointing] = (),
    suite: str = "quick",
    select: Sequence[str] = (),
    ignore: Mapping[str, str] | None = None,
    strict: bool = False,
    timeout: float = 600.0,
    jobs: int = 0,
    **options: Any,
) -> Report:
    """Check a preparation function against the specification, as ``kbitcheck impl`` does.

    A string names it (``peft``, ``module:function``, ``file.py:function``) and runs in ``jobs``
    worker processes (0: one a core where all models are recipes), with ``timeout`` seconds for each case; a callable
    runs in this process, without a time limit. ``options`` are those of
    ``kbitcheck.extend.CaseSpec``.

    Raises:
        UsageError: an option, rule, model or implementation is wrong.
    """
    from kbitcheck.core.rule import select as selected
    from kbitcheck.run import subject as implementations
    from kbitcheck.run.examine import judging
    from kbitcheck.run.importable import importable_name
    from kbitcheck.run.notebook_progress import notebook_progress
    from kbitcheck.run.runner import run
    from kbitcheck.run.suites import suite_cases, workers

    if isinstance(prepare, str):
        implementations.validate(prepare)
        live, name = None, prepare
    else:
        live = implementations.describe(prepare)
        # A lambda or a closure has no name by which a command of the report could find it.
        with contextlib.suppress(UsageError, TypeError):
            live = dataclasses.replace(live, name=importable_name(prepare))
        name = live.name
    specs = suite_cases(
        suite,
        models=models,
        quants=quants,
        checkpointing=checkpointing,
        implementation=name,
        **{"device": "auto", **options},
    )
    rules = selected(select, ignore, about={spec.about for spec in specs})
    with notebook_progress(sum(len(judging(spec, rules)) for spec in specs)) as advance:
        return run(
            specs, rules, timeout=timeout, jobs=jobs or workers(specs), implementation=live, strict=strict,
            subject={"command": "impl", "ignored": dict(ignore or {})}, on_event=advance,
        )  # fmt: skip


def assert_prepared(
    model: Any,
    profile: Profile = "auto",
    *,
    freezes: Freezes = "at-prepare",
    checkpointing: Checkpointing | None = None,
    strict: bool = False,
    select: Sequence[str] = (),
    ignore: Mapping[str, str] | None = None,
    batch: Mapping[str, Any] | None = None,
    loss: Callable[[Any], Any] | None = None,
    trains: Sequence[str] = (),
    optimizer: Any = None,
    learning_rate: float | None = None,
    allow_step: bool | None = None,
) -> Report:
    """Assert that a quantized model is ready for k-bit training as it stands, with or without adapters.

    Training steps run on the model itself, with ``batch`` (keyword arguments of its forward, labels among them; drawn
    where none is given). ``loss`` makes the loss, a tensor of one number, of what the forward returns; without it the
    loss is the model's own, or one that depends on every tensor that comes out. ``trains`` names parts
    of the model that are meant to train beside adapters, such as ``["v_head"]``: whole parts of a dotted path. Afterwards the model is
    bitwise what it was, also after an exception: parameters, gradients, buffers, modes, hooks, random states. ``allow_step=False`` forbids
    steps; the report then says what was not judged.
    ``optimizer`` is the one that trains the model: two of its steps are taken, and undone, to count the updates that half
    precision rounds away (KB313). A ``Trainer`` in place of ``model`` brings its own. Without either, KB313 is a forecast
    for AdamW at ``learning_rate`` (by default the trainer's whose recipe the model follows), and is never counted.
    Where FSDP shards the model, steps need ``allow_step=True`` on every rank.

    Rules that need what was before preparation are skipped. Profile ``auto`` reads the recipe of dtypes off the model
    and judges by it, and so it cannot see that an upcast is missing: if your code promises one, name its ``profile``.
    ``checkpointing`` is what was requested (``None``: whatever is on). Returns the report where it conforms.

    Raises:
        NonConformance: an ``AssertionError`` with the report as its message.
        UsageError: an option or rule is wrong, or the model is not quantized.
    """
    __tracebackhide__ = True  # pytest shows the report, not this function
    from kbitcheck.report import render
    from kbitcheck.run import in_process

    report = in_process.assert_prepared(
        model,
        Training(batch=batch, loss=loss, trains=tuple(trains), optimizer=optimizer, rate=learning_rate),
        profile=profile,
        freezes=freezes,
        checkpointing=checkpointing,
        strict=strict,
        select_codes=select,
        ignore=ignore or {},
        allow_step=allow_step,
    )
    if report.exit_code:
        raise NonConformance(report, render(report, "text"))
    return report


def watch(
    model: Any,
    optimizer: Any = None,
    *,
    steps: int = STEPS,
    profile: Profile = "auto",
    strict: bool = False,
    select: Sequence[str] = (),
    ignore: Mapping[str, str] | None = None,
    trains: Sequence[str] = (),
) -> "Watch":
    """A context that watches the first optimizer steps of your own training, and has the ``report`` of them.

    ``with kbitcheck.watch(model, optimizer) as watched: ...`` changes no bit of the run: it reads what your steps compute,
    and compares one block of every kind in each step with a float64 twin. After ``steps`` optimizer steps it takes
    itself off. ``optimizer`` may be left out: then whichever steps the model's parameters is watched. ``trains`` names parts
    of the model that are meant to train beside adapters and what the optimizer holds, as in ``assert_prepared``.

    A watcher that fails lets the run go on; the report then says ERROR. ``watched.raise_for_failures()`` raises
    ``NonConformance`` unless the run conforms.

    Raises:
        UsageError: an option or rule is wrong, or the model is not quantized.
    """
    from kbitcheck.run.watch import Watch
    from kbitcheck.run.watch_settings import Settings

    settings = Settings(
        steps=steps, profile=profile, strict=strict, select=select, ignore=ignore or {}, trains=tuple(trains)
    )
    return Watch(model, optimizer, settings)
