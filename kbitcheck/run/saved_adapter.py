"""Judges a saved adapter, in the process that calls."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kbitcheck.core.events import Collector, Loaded
from kbitcheck.core.report import Report, assemble
from kbitcheck.core.rule import select
from kbitcheck.run.examine import examine


def judge(
    path: Path,
    *,
    base: str = "",
    quant: str = "",
    select_codes: Sequence[str] = (),
    ignore: Mapping[str, str] | None = None,
    strict: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """The report on the adapter in a directory; raises ``UsageError`` where there is none, or where ``base`` cannot be read.

    The adapter is merged into ``base`` as ``quant`` quantizes it (default: as it is already, else nf4).
    """
    rules = select(select_codes, ignore, about="adapter")
    start = time.perf_counter()
    from kbitcheck.core import machine
    from kbitcheck.observe.adapter.case import AdapterCase

    case = AdapterCase(path, base=base, quant=quant, trust_remote_code=trust_remote_code)
    loaded = Loaded(implementation={"name": "the adapter"}, environment=machine.versions())
    collector = Collector(loaded=loaded)
    for event in examine(case, rules):
        collector.add(event)
    return assemble(
        collector,
        {case.case: case.spec.as_json()},
        subject={"command": "adapter", "ignored": dict(ignore or {})},
        in_process=True,
        strict=strict,
        seconds=time.perf_counter() - start,
    )
