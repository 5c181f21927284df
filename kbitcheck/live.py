"""Audits a model that already lives in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import kbitcheck
from kbitcheck.core import Report, Result
from kbitcheck.core import select as chosen
from kbitcheck.worker import examine


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
    from kbitcheck import environment, implementations
    from kbitcheck.case import open_live

    rules = chosen(select, ignore)
    subject = (
        implementations.load(prepare or implementations.default())
        if isinstance(prepare, str)
        else implementations.describe(prepare)
    )
    start = time.perf_counter()
    case = open_live(model, implementation=subject, **options)
    told = environment.describe(str(next(model.parameters()).device), case.spec.seed)
    events = list(examine(case, rules))
    return Report(
        tool=f"kbitcheck {kbitcheck.__version__}",
        environment=told,
        subject={
            "command": "audit",
            "ignored": dict(ignore),
            "implementation": subject.as_json(),
            "in_process": True,
            "cases": {case.case: case.spec.as_json()},
        },
        results=tuple(Result.from_json(e["result"]) for e in events if e["event"] == "result"),
        blame="any",
        strict=strict,
        facts={
            "cases": {e["case"]: e["facts"] for e in events if e["event"] == "facts"},
            "seconds": round(time.perf_counter() - start, 3),
        },
    )
