"""An exception is reported with its type, its message and the innermost place outside kbitcheck."""

from __future__ import annotations

import importlib
import json
import re

import pytest

from kbitcheck.core.errors import Raised, Unavailable, cause
from kbitcheck.core.rule import rule


def caught(function: object, *arguments: object) -> Exception:
    try:
        function(*arguments)  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def bare() -> None:
    raise NotImplementedError


def in_kbitcheck() -> None:
    rule("nonsense", "x", "MUST")(lambda facts: ())  # type: ignore[arg-type]


def imports() -> None:
    importlib.import_module("no_such_module_anywhere")


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        (bare, r"NotImplementedError \(test_errors.py:\d+\)"),
        (in_kbitcheck, r"ValueError: 'nonsense' is not a fresh rule code \(test_errors.py:\d+\)"),
        (imports, r"ModuleNotFoundError: No module named 'no_such_module_anywhere' \(__init__.py:\d+\)"),
        (lambda: json.loads("{"), r"JSONDecodeError: .* \(decoder.py:\d+\)"),
        (lambda: pytest.importorskip(1), r"\w+Error.* \(_pytest/\w+.py:\d+\)"),  # type: ignore[arg-type]
    ],
)
def test_the_cause_has_type_message_and_place(function: object, pattern: str) -> None:
    assert re.fullmatch(pattern, cause(caught(function)))


def test_an_exception_that_was_never_raised_has_no_place() -> None:
    assert cause(ValueError("one\ntwo")) == "ValueError: one"


def test_two_are_equal_wherever_they_were_raised() -> None:
    first, second = Raised.of(caught(bare)), Raised("NotImplementedError")
    assert first == second
    assert str(first) != str(second)
    assert first != Raised("NotImplementedError", "why")


def test_a_fact_says_whether_it_failed() -> None:
    assert not Unavailable("no step").failed
    assert Unavailable("no step", failed=True).failed
