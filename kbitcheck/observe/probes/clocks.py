"""Clocks that are ahead: what a process does only after hours shows at once."""

import datetime
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

AHEAD = 3 * 3600  # seconds: longer than anybody would wait
CLOCKS = {
    "time": 1,
    "monotonic": 1,
    "perf_counter": 1,
    "time_ns": 10**9,
    "monotonic_ns": 10**9,
    "perf_counter_ns": 10**9,
}
DATETIME = datetime.datetime


class _AnyDatetime(type(DATETIME)):  # type: ignore[misc]
    """Makes a date and time that was taken before an instance too."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, DATETIME)


class _Later(DATETIME, metaclass=_AnyDatetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return DATETIME.now(tz) + datetime.timedelta(seconds=AHEAD)

    @classmethod
    def utcnow(cls) -> Any:
        return cls.now(datetime.UTC).replace(tzinfo=None)

    @classmethod
    def today(cls) -> Any:
        return cls.now()


@contextmanager
def hours_later() -> Iterator[None]:
    """The clocks of ``time`` and ``datetime`` ahead, also where a module imported one by its name."""

    def ahead(clock: Callable[[], Any], seconds: int) -> Any:
        return clock() + seconds

    clocks: dict[int, Any] = {id(DATETIME): _Later}
    for name, unit in CLOCKS.items():
        clock = getattr(time, name)
        clocks[id(clock)] = partial(ahead, clock, AHEAD * unit)
    names = [
        (vars(module), name, value)
        for module in list(sys.modules.values())
        if getattr(module, "__name__", __name__) != __name__  # what stands there need be no module
        for name, value in list(vars(module).items())
        if id(value) in clocks
    ]
    for namespace, name, value in names:
        namespace[name] = clocks[id(value)]
    try:
        yield
    finally:
        for namespace, name, value in names:
            namespace[name] = value
