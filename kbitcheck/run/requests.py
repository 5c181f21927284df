"""What a worker process is asked to do: typed requests and their JSON form for the pipe. No torch here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from kbitcheck.core.cases import CaseSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Import the implementation, from the directories in ``path`` first; with ``static`` only name it."""

    implementation: str
    device: str
    seed: int
    path: tuple[str, ...] = ()
    static: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Examine:
    """Judge a case by the rules with these codes. ``seconds`` is the time limit of the case."""

    spec: CaseSpec
    rules: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MakePlan:
    """Plan cases that are judged by the rules with these codes, each within ``seconds``; nothing is run."""

    specs: tuple[CaseSpec, ...]
    rules: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ListArchitectures:
    """List the architectures that the installed transformers has for a task."""

    task: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TryFaults:
    """Try the faults of the rules with these codes; with ``matrix`` judge every fault by every rule."""

    codes: tuple[str, ...]
    matrix: bool = False


Request = Load | Examine | MakePlan | ListArchitectures | TryFaults
KINDS: Mapping[str, type[Request]] = {kind.__name__: kind for kind in get_args(Request)}


def as_json(request: Request) -> dict[str, Any]:
    """A JSON-able dictionary; ``request`` is the name of the class."""
    return {"request": type(request).__name__, **asdict(request)}


def from_json(data: Mapping[str, Any]) -> Request:
    """Inverse of ``as_json``."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
    kind = KINDS[values.pop("request")]
    if "spec" in values:
        values["spec"] = CaseSpec.from_json(values["spec"])
    if "specs" in values:
        values["specs"] = tuple(map(CaseSpec.from_json, values["specs"]))
    return kind(**values)
