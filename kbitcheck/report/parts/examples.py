"""The failing examples of a rule: the faults that it must catch, as source text. The sources are read, not imported."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SABOTAGE = Path(__file__).parents[2] / "sabotage"
CASE = {"model": "tiny:gpt2", "quant": "nf4", "checkpointing": "reentrant"}
# How a fault is registered, and what that says of it.
KINDS = {
    "breaks": "Done to a model that the reference prepared",
    "wraps": "Done to the reference, which then prepares",
    "implements": "An implementation of its own",
    "casts": "The cast of an implementation of its own, which freezes and enables checkpointing well",
    "adds": "Done by an implementation of its own, besides freezing, casting and enabling checkpointing",
    "spoils": "Done to the model before it is prepared",
}
Definition = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Example:
    """A fault: its name, the decorator that registers it, the case it shows on, and its source with its helpers."""

    name: str
    kind: str
    case: str
    source: str

    @property
    def title(self) -> str:
        """How the fault comes about, in words."""
        return KINDS[self.kind]


def examples(code: str) -> tuple[Example, ...]:
    """The faults that a rule must catch, in the order of their files."""
    return tuple(example for path in sorted(SABOTAGE.rglob("*.py")) for example in _of_file(path).get(code, ()))


@cache
def _of_file(path: Path) -> dict[str, list[Example]]:
    text = path.read_text(encoding="utf-8")
    definitions = {n.name: n for n in ast.parse(text).body if isinstance(n, Definition)}
    of_code: dict[str, list[Example]] = {}
    for definition in definitions.values():
        for registration in _registrations(definition):
            arguments = {k.arg: k.value.value for k in registration.keywords if isinstance(k.value, ast.Constant)}
            example = Example(
                name=definition.name,
                kind=registration.func.id,  # type: ignore[attr-defined]
                case=", ".join(str(arguments.get(name, default)) for name, default in CASE.items()),
                source=_source(definition, definitions, text.splitlines()),
            )
            of_code.setdefault(ast.literal_eval(registration.args[0]), []).append(example)
    return of_code


def _registrations(definition: Definition) -> Iterator[ast.Call]:
    for call in definition.decorator_list:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in KINDS:
            yield call


def _source(definition: Definition, definitions: dict[str, Definition], lines: list[str]) -> str:
    """The definition, after the private helpers of its module that it uses."""
    wanted = {definition.name: definition}
    queue: list[Definition] = [definition]
    for user in queue:
        names = {node.id for node in ast.walk(user) if isinstance(node, ast.Name)}
        helpers = [d for name, d in definitions.items() if name in names - wanted.keys() and not any(_registrations(d))]
        wanted |= {helper.name: helper for helper in helpers}
        queue += helpers
    parts = [*sorted((d for d in wanted.values() if d is not definition), key=lambda d: d.lineno), definition]
    return "\n\n\n".join("\n".join(lines[_first_line(part) - 1 : part.end_lineno]) for part in parts)


def _first_line(definition: Definition) -> int:
    return min([definition.lineno, *(decorator.lineno for decorator in definition.decorator_list)])
