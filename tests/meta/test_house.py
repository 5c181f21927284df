"""The size and the form of the package: few rooms, short files, short functions, no cycles, names that say something."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kbitcheck

PACKAGE = Path(kbitcheck.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "reference").rglob("*.py")])
FILE_LINES, FUNCTION_LINES, ENTRIES, UNCLEAR_NAMES = 350, 60, 18, 20
UNCLEAR = ("told", "found", "known", "given", "alike", "whose")


def first_comment(lines: list[str]) -> str:
    """The first line that is a comment, without its sign."""
    return next((line.strip().removeprefix("#").strip() for line in lines if line.strip().startswith("#")), "")


def too_long(source: str) -> Iterator[str]:
    """A file or its functions that are longer than allowed, unless their first comment starts with ``Long:``."""
    lines = source.splitlines()
    if len(lines) > FILE_LINES and not first_comment(lines).startswith("Long:"):
        yield f"the file: {len(lines)} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = lines[node.lineno - 1 : node.end_lineno]
            if len(body) > FUNCTION_LINES and not first_comment(body).startswith("Long:"):
                yield f"{node.name}: {len(body)} lines"


def unclear_names(source: str) -> Iterator[str]:
    """Every use of a name that says how a value was obtained, not what it is."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                names = [name]
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names = [name]
            case ast.alias(name=name, asname=other):
                names = [(other or name).rpartition(".")[2]]
            case _:
                names = []
        yield from (name for name in names if any(word in name.lower() for word in UNCLEAR))


def cycles() -> list[set[str]]:
    """Files that import each other, also inside functions and for types alone."""
    grimp = pytest.importorskip("grimp")
    networkx = pytest.importorskip("networkx")
    graph = grimp.build_graph("kbitcheck", "kbitcheck_reference", cache_dir=None)
    arrows = networkx.DiGraph(
        (module, target) for module in graph.modules for target in graph.find_modules_directly_imported_by(module)
    )
    return [component for component in networkx.strongly_connected_components(arrows) if len(component) > 1]


def test_the_package_has_few_entries() -> None:
    entries = {path.name for path in PACKAGE.iterdir()} - {"py.typed", "__pycache__"}
    assert len(entries) <= ENTRIES, sorted(entries)


def test_no_file_and_no_function_is_long_without_a_reason() -> None:
    long = {str(path.relative_to(ROOT)): [*too_long(path.read_text(encoding="utf-8"))] for path in SOURCES}
    assert {name: parts for name, parts in long.items() if parts} == {}


def test_a_script_is_run_when_all_of_it_is_defined() -> None:
    """What stands behind the line that runs a script exists for those who import it alone."""
    folders = ("benchmarks", "docs", "kbitcheck", "reference")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        before = ast.parse(path.read_text(encoding="utf-8")).body[:-1]
        assert not [node for node in before if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)], path


def test_no_files_import_each_other() -> None:
    assert cycles() == []


def test_names_say_what_they_name() -> None:
    uses = {str(path.relative_to(ROOT)): [*unclear_names(path.read_text(encoding="utf-8"))] for path in SOURCES}
    assert sum(map(len, uses.values())) <= UNCLEAR_NAMES, {name: names for name, names in uses.items() if names}


@pytest.mark.parametrize("reason", ["", "# Long: it is a table\n"])
def test_long_parts_are_seen_and_a_reason_excuses_them(reason: str) -> None:
    function = "def f():\n" + (f"    {reason}" if reason else "") + "    x = 1\n" * FUNCTION_LINES
    assert bool([*too_long(function)]) == (not reason)
    assert bool([*too_long(reason + "x = 1\n" * (FILE_LINES + 1))]) == (not reason)


def test_unclear_names_are_seen() -> None:
    source = "import a.found\nfrom b import c as known_c\ndef given(told, *, x=1):\n    y.whose = f(alike=1)\n"
    assert sorted(unclear_names(source)) == ["alike", "found", "given", "known_c", "told", "whose"]
    assert [*unclear_names("import found.a\nfrom told import x\n'given'")] == []
