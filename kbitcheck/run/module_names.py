"""Which names a module has, read off its source: a wrong one is refused without the seconds that an import takes."""

import ast
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

# With any of these in its source, a module may have names that the source does not bind.
HIDES = ("__getattr__", "globals(", "setattr(", "exec(", "sys.modules", "__path__", "vars(", "locals(")


def absent_module(dotted: str, path: Sequence[str]) -> tuple[str, list[str]] | None:
    """The first part of a module's dotted name that is not there, and where modules beside it lie; None where it may be."""
    names, beside = dotted.split("."), list(path)
    for number in range(len(names)):
        name = ".".join(names[: number + 1])
        spec = PathFinder.find_spec(name, beside)
        if spec is None:
            return name, beside
        if _source(spec) is None:
            return None
        beside = list(spec.submodule_search_locations or ())
    return None


def names_of(dotted: str, path: Sequence[str]) -> set[str] | None:
    """The names that a module binds; None where its source does not tell."""
    beside, spec = list(path), None
    names = dotted.split(".")
    for number in range(len(names)):
        spec = PathFinder.find_spec(".".join(names[: number + 1]), beside)
        if spec is None:
            return None
        beside = list(spec.submodule_search_locations or ())
    source = None if spec is None else _source(spec)
    return None if source is None else names_in(source)


def names_in(source: str) -> set[str] | None:
    """The names that a module's source binds anywhere; None where it may have others, or is no Python."""
    if any(word in source for word in HIDES):
        return None
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    names = set(_bound(tree))
    raises = any(isinstance(node, ast.Raise) for node in tree.body)  # with advice of its own
    return None if raises or "*" in names else names


def _bound(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.alias(name=name, asname=other):
                yield other or name.partition(".")[0]
            case ast.Name(id=name, ctx=ast.Store()):
                yield name


def _source(spec: ModuleSpec) -> str | None:
    """The source of a module that PathFinder sees; None of what hides names, or is no file."""
    try:
        source = Path(spec.origin or "").read_text(encoding="utf-8") if (spec.origin or "").endswith(".py") else None
    except (OSError, ValueError):
        return None
    return None if source is None or any(word in source for word in HIDES) else source
