"""The failing examples of a rule: the faults that it must catch, as source text. The sources are read, not imported."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SABOTAGE = Path(__file__).parents[2] / "sabotage"
CASE = {"model": "tiny:gpt2", "quant": "nf4", "checkpointing": "reentrant"}
# The decorator that registers a fault, and what that says of it.
KINDS = {
    "breaks": "Done to a model that the reference prepared",
    "wraps": "Done to the reference, which then prepares",
    "implements": "An implementation of its own",
    "casts": "The cast of an implementation of its own, which freezes and enables checkpointing well",
    "adds": "Done by an implementation of its own, besides freezing, casting and enabling checkpointing",
    "trains": "A training script",
    "composes": "A script around a prepared model",
    "saves": "Done to the files of a saved adapter",
    "merges": "A merge of each layer of a saved adapter",
    "spoils": "Done to the model before it is prepared",
}
OF_KIND = {"composes": {"model": "tiny:llama", "checkpointing": "non-reentrant"}}
Definition = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Example:
    """A fault: its name, how it comes about, the case it shows on, and its source with its helpers."""

    name: str
    title: str
    case: str
    source: str


def examples(code: str) -> tuple[Example, ...]:
    """The faults that a rule must catch, in the order of their files."""
    return tuple(example for path in sorted(SABOTAGE.rglob("*.py")) for example in _of_file(path).get(code, ()))


@cache
def _of_file(path: Path) -> dict[str, list[Example]]:
    of_code: dict[str, list[Example]] = {}
    definitions, lines = _definitions(path)
    for definition in definitions.values():
        for registration in _registrations(definition):
            _add(of_code, registration, definition, definitions, lines)
    whole = "\n".join(lines)
    for loop in ast.parse(whole).body:
        if isinstance(loop, ast.For):
            for registration, fault in _registered_elsewhere(loop):
                (home,) = path.parent.rglob(f"{fault.value.id}.py")  # type: ignore[attr-defined]
                others, text = _definitions(home)
                first = others[fault.attr].lineno - 1
                text[first] = f"@{ast.get_source_segment(whole, registration)}\n{text[first]}"
                _add(of_code, registration, others[fault.attr], others, text)
    return of_code


def _definitions(path: Path) -> tuple[dict[str, Definition], list[str]]:
    text = path.read_text(encoding="utf-8")
    return {n.name: n for n in ast.parse(text).body if isinstance(n, Definition)}, text.splitlines()


def _add(
    of_code: dict[str, list[Example]],
    registration: ast.Call,
    definition: Definition,
    definitions: dict[str, Definition],
    lines: list[str],
) -> None:
    arguments = {str(k.arg): k.value.value for k in registration.keywords if isinstance(k.value, ast.Constant)}
    kind = registration.func.id  # type: ignore[attr-defined]
    where: dict[str, object] = {**CASE, **OF_KIND.get(kind, {}), **arguments}
    composition = [str(ast.literal_eval(each)) for each in registration.args[1:]]
    example = Example(
        name=definition.name,
        title=KINDS[kind],
        case=", ".join([*(str(where[name]) for name in CASE), *composition]),
        source=_source(definition, definitions, lines),
    )
    of_code.setdefault(ast.literal_eval(registration.args[0]), []).append(example)


def _registered_elsewhere(loop: ast.For) -> Iterator[tuple[ast.Call, ast.Attribute]]:
    """Faults of a file that knows nothing of kbitcheck: ``for fault in (module.one, module.other): breaks(CODE)(fault)``."""
    calls = [line.value.func for line in loop.body if isinstance(line, ast.Expr) and isinstance(line.value, ast.Call)]
    for call in calls:
        if isinstance(call, ast.Call) and isinstance(loop.iter, ast.Tuple):
            yield from ((call, fault) for fault in loop.iter.elts if isinstance(fault, ast.Attribute))


def _registrations(definition: Definition) -> list[ast.Call]:
    calls = [call for call in definition.decorator_list if isinstance(call, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in KINDS]


def _source(definition: Definition, definitions: dict[str, Definition], lines: list[str]) -> str:
    """The definition, after the private helpers of its module that it uses."""
    wanted = {definition.name: definition}
    queue: list[Definition] = [definition]
    for user in queue:
        names = {node.id for node in ast.walk(user) if isinstance(node, ast.Name)}
        helpers = [d for name, d in definitions.items() if name in names - wanted.keys() and not _registrations(d)]
        wanted |= {helper.name: helper for helper in helpers}
        queue += helpers
    parts = [*sorted((d for d in wanted.values() if d is not definition), key=lambda d: d.lineno), definition]
    starts = [min(node.lineno for node in (part, *part.decorator_list)) for part in parts]
    return "\n\n\n".join(
        "\n".join(lines[start - 1 : part.end_lineno]) for start, part in zip(starts, parts, strict=True)
    )
