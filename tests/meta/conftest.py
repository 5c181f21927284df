"""Faults, and bases to try them on."""

from __future__ import annotations

from typing import Any

import pytest

from kbitcheck.run import selftest
from kbitcheck.sabotage import Fault
from tests.shallow import shallow


@pytest.fixture
def shallow_bases(bases: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Bases with two blocks in each tower, and faults that are tried on such."""
    monkeypatch.setattr(selftest, "resolve", shallow)
    found: dict[Any, Any] = bases.setdefault(shallow, {})
    return found


def of_one_base(fault: Fault) -> pytest.MarkDecorator:
    """Puts tests of faults of one base into one process."""
    return pytest.mark.xdist_group(f"{fault.model}-{fault.quant}")
