"""A stub of ``kbitcheck.observe.lent``: nothing runs, so that nothing is restored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def why_no_step(model: Any, *, allow_step: bool | None) -> str:
    return ""


@contextmanager
def lending(model: Any) -> Iterator[Callable[[], None]]:
    yield lambda: None


def unwrapped(model: Any) -> Any:
    return model
