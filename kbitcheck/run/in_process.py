"""Audits a model that already lives in this process."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import Report
from kbitcheck.core.result import Result
from kbitcheck.core.rule import select as chosen
from kbitcheck.core.version import TOOL
from kbitcheck.observe.heap import LARGE_BYTES
from kbitcheck.run.worker import examine


@contextmanager
def as_a_worker() -> Iterator[Callable[[int], None]]:
    """What a worker process sets for itself, for a while: one thread till ``fit`` is told of a large model, no compiler.

    The probes' own warnings are kept off the screen; rules hear warnings all the same.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield lambda nbytes: torch.set_num_threads(threads if nbytes > LARGE_BYTES else 1)
    finally:
        torch.set_num_threads(threads)


def audit(
    model: Any,
    prepare: str | Callable[..., Any],
    *,
    select: Sequence[str],
    ignore: Mapping[str, str],
    strict: bool,
    options: Mapping[str, Any],
) -> Report:
    """``kbitcheck.audit`` after its defaults are filled in.

    Raises:
        UsageError: an option, rule or implementation is wrong, or the model is not quantized.
    """
    from kbitcheck.core import machine as environment
    from kbitcheck.judge.conditions import settle
    from kbitcheck.observe.case import open_live
    from kbitcheck.run import subject as implementations

    if not callable(getattr(model, "parameters", None)):
        raise UsageError(f"not a model: {model!r}; a name is for `kbitcheck model`")
    rules = chosen(select, ignore)
    subject = (
        implementations.load(prepare or implementations.default())
        if isinstance(prepare, str)
        else implementations.describe(prepare)
    )
    start = time.perf_counter()
    with as_a_worker() as fit:
        case = open_live(model, implementation=subject, **options)
        fit(case.base.nbytes)
        told = environment.describe(str(next(model.parameters()).device), case.spec.seed)
        events = list(examine(case, rules))
    return Report(
        tool=TOOL,
        environment=told,
        subject={
            "command": "audit",
            "ignored": dict(ignore),
            "implementation": subject.as_json(),
            "in_process": True,
            "cases": {case.case: case.spec.as_json()},
        },
        results=tuple(settle(Result.from_json(e["result"]), subject.name) for e in events if e["event"] == "result"),
        blame="any",
        strict=strict,
        facts={
            "cases": {e["case"]: e["facts"] for e in events if e["event"] == "facts"},
            "seconds": round(time.perf_counter() - start, 3),
        },
    )
