"""How a case gives its facts: a fact is computed when a rule first reads it, and kept until the case is closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import Facts

T = TypeVar("T")
C = TypeVar("C", bound=type)

NAMES = tuple(name for name, member in vars(Facts).items() if isinstance(member, property))


class OpenCase(Facts, Protocol):
    """A case whose facts can be read, and whose models are dropped when it is closed."""

    spec: CaseSpec

    def summary(self) -> dict[str, Any]:
        """Figures for a report."""
        ...

    def close(self) -> None:
        """Drop every model of the case."""
        ...


class Fact(Generic[T]):
    """An attribute that is computed when it is first read and then kept in the owner's ``computed``.

    ``"memory" in case.computed`` says whether a fact has been computed; clearing ``computed`` frees all of them.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, cls: type | None = None) -> T:
        computed: dict[str, Any] = owner.computed
        if self._name not in computed:
            computed[self._name] = self._compute(owner)
        value: T = computed[self._name]
        return value


class MissingFact:
    """A fact that a case does not have: reading it raises. An instance's own attribute of that name comes first."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __get__(self, case: Any, cls: type | None = None) -> Any:
        raise Unavailable(self._reason)


def other_facts_missing(reason: str) -> Callable[[C], C]:
    """Class decorator: each fact of ``Facts`` that the class does not define raises ``Unavailable`` with the reason."""

    def decorate(cls: C) -> C:
        for name in NAMES:
            if name not in vars(cls):
                setattr(cls, name, MissingFact(reason))
        return cls

    return decorate
