"""Which facts a rule reads, as the source of its check says."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any


@cache
def facts_read(check: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the attributes that a check reads of its facts, itself or in functions that it passes them to, in order.

    Some are read under a condition alone. The witnesses of a decorator are not among them.
    """
    return tuple(dict.fromkeys(_read(inspect.unwrap(check), 0, frozenset())))


def _read(function: Any, position: int, callers: frozenset[Any]) -> Iterator[str]:
    """The attributes that a function reads of its argument in this position, which holds the facts."""
    if (function, position) in callers or not isinstance(function, FunctionType):
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    arguments = tree.args.args
    if position >= len(arguments):
        return
    facts = arguments[position].arg
    for node in sorted(filter(_placed, (n for statement in tree.body for n in ast.walk(statement))), key=_place):
        if isinstance(node, ast.Attribute) and _is(node.value, facts):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = inspect.unwrap(function.__globals__.get(node.func.id, len))
            for index, argument in enumerate(node.args):
                if _is(argument, facts):
                    yield from _read(called, index, callers | {(function, position)})


def _placed(node: ast.AST) -> bool:
    return isinstance(node, ast.expr)


def _place(node: Any) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
