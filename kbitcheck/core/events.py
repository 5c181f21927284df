"""What happens while cases are judged: typed events, their JSON form for the pipe to a worker, and their collector."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from kbitcheck.core.errors import Short
from kbitcheck.core.plan import Plan
from kbitcheck.core.result import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The base of all events. ``as_json`` is read back by ``from_json``."""

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``event`` is the name of the class."""
        return {"event": type(self).__name__, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready(Event):
    """A worker has imported the stack and takes requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Event):
    """The implementation (name, version, ...) is imported; ``environment`` are versions, device and seed."""

    implementation: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """A case begins."""

    case: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    """What a case will compute (``core.plan.Plan``)."""

    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Computing(Event):
    """A fact is computed. ``left`` are the predicted seconds until the case ends; None where nothing is predicted."""

    case: str
    fact: str
    left: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged(Event):
    """A rule was judged on a case. After a ``fatal`` error the process is not to be trusted with another case.

    ``short_of``: what ran out, where that made the result an ERROR.
    """

    result: Result
    fatal: bool = False
    short_of: Short = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures(Event):
    """What a report shows of a case in figures."""

    case: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architectures(Event):
    """Class names by model type: what the installed transformers has for a task."""

    classes: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultTried(Event):
    """Whether a rule caught a fault. ``caught`` is None where this machine cannot say; ``reason`` tells what was seen.

    ``kills`` are the rules that the fault broke, None where only its own rule was judged; ``alone`` says that no other
    rule may break.
    """

    code: str
    fault: str
    case: str
    caught: bool | None
    reason: str
    level: str = "implementation"
    alone: bool = False
    kills: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Event):
    """The request is answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongUsage(Event):
    """Wrong input, in the words of a ``UsageError``. ``missing``: a module or function that is not there."""

    message: str
    cause: str = ""
    missing: bool = False
    traceback: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken(Event):
    """A request failed. After a ``fatal`` error the process is not to be trusted with another case."""

    cause: str
    fatal: bool = False
    short_of: Short = ""
    traceback: str = ""


KINDS: Mapping[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        Ready,
        Loaded,
        Started,
        Planned,
        Computing,
        Judged,
        Figures,
        Architectures,
        FaultTried,
        Done,
        WrongUsage,
        Broken,
    )
}

# The events that end the answer to a request.
LAST = (Ready, Loaded, Done, WrongUsage, Broken)


def from_json(data: Any) -> Event:
    """Inverse of ``Event.as_json``; a ``ValueError`` where the data is no event."""
    try:
        values = {name: value for name, value in data.items() if name != "event"}
        if "result" in values:
            values["result"] = Result.from_json(values["result"])
        if "plan" in values:
            values["plan"] = Plan.from_json(values["plan"])
        if isinstance(values.get("kills"), list):
            values["kills"] = tuple(values["kills"])
        return KINDS[data["event"]](**values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"no event: {type(error).__name__}: {error}") from None


Settle = Callable[[Result, Mapping[str, Any]], Result]


class Collector:
    """Gathers what a report is assembled from: results in the order in which they came, and facts by case.

    ``settle`` sees each result first, with the environment, to excuse it by a finding.
    """

    def __init__(self, settle: Settle = lambda result, environment: result, *, loaded: Loaded | None = None) -> None:
        self._settle = settle
        self.results: list[Result] = []
        self.facts: dict[str, Mapping[str, Any]] = {}
        self.loaded = loaded or Loaded()

    def add(self, event: Event) -> Event:
        """Gather from an event; the event itself, with its result settled."""
        if isinstance(event, Judged):
            event = replace(event, result=self._settle(event.result, self.loaded.environment))
            self.results.append(event.result)
        elif isinstance(event, Figures):
            self.facts[event.case] = event.facts
        elif isinstance(event, Loaded):
            self.loaded = event
        return event


def _plain(value: Any) -> Any:
    if isinstance(value, (Result, Plan)):
        return value.as_json()
    return list(value) if isinstance(value, tuple) else value
