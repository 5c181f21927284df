"""What a worker process is asked to do: typed requests and their JSON form for the pipe. No torch here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kbitcheck.core.cases import CaseSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The base of all requests. ``as_json`` is read back by ``from_json``."""

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``request`` is the name of the class."""
        return {"request": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Request):
    """Import the implementation, from the directories in ``path`` first; with ``static`` only name it."""

    implementation: str
    device: str
    seed: int
    path: tuple[str, ...] = ()
    static: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Examine(Request):
    """Judge a case by the rules with these codes. ``seconds`` is the time limit of the case."""

    spec: CaseSpec
    rules: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ListArchitectures(Request):
    """List the architectures that the installed transformers has for a task."""

    task: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TryFaults(Request):
    """Try the faults of the rules with these codes; with ``matrix`` judge every fault by every rule."""

    codes: tuple[str, ...]
    matrix: bool = False


KINDS: Mapping[str, type[Request]] = {kind.__name__: kind for kind in (Load, Examine, ListArchitectures, TryFaults)}


def from_json(data: Mapping[str, Any]) -> Request:
    """Inverse of ``Request.as_json``."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
    kind = KINDS[values.pop("request")]
    if "spec" in values:
        values["spec"] = CaseSpec.from_json(values["spec"])
    return kind(**values)
