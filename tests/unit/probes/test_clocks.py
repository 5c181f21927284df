"""Clocks that are ahead for a while, however a module came by them."""

from __future__ import annotations

import datetime
import sys
import time
from types import ModuleType

from kbitcheck.observe.probes.clocks import AHEAD, hours_later

SCRIPT = """
import datetime, time
from datetime import datetime as when
from time import monotonic as clock, time_ns
def read():
    now = datetime.datetime.now(datetime.timezone.utc).timestamp()
    return [time.time(), clock(), time_ns() / 1e9, when.now().timestamp(), now, when.today().timestamp()]
def same(earlier):
    return isinstance(earlier, when) and isinstance(earlier, datetime.datetime) and earlier < when.now()
"""


def test_every_clock_is_ahead_and_then_as_it_was() -> None:
    module = ModuleType("somebodys_clock")
    sys.modules[module.__name__] = module
    try:
        exec(SCRIPT, vars(module))
        before, earlier = module.read(), datetime.datetime.now()
        names = dict(vars(module))
        with hours_later():
            assert all(AHEAD <= now - then < AHEAD + 60 for now, then in zip(module.read(), before, strict=True))
            assert module.same(earlier)
            assert not isinstance("2026", datetime.datetime)
        assert all(0 <= now - then < 60 for now, then in zip(module.read(), before, strict=True))
        assert dict(vars(module)) == names
        assert time.time.__name__ == "time"
    finally:
        del sys.modules[module.__name__]


def test_clocks_are_restored_where_a_look_raises() -> None:
    clock = time.monotonic
    try:
        with hours_later():
            raise KeyError
    except KeyError:
        assert time.monotonic is clock
        assert datetime.datetime.__name__ == "datetime"
