"""Which committed finding excuses a failure."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kbitcheck.core.cases import REFERENCE
from kbitcheck.core.result import Observation, Party, Result, Status


@cache
def findings() -> Mapping[tuple[str, Party], str]:
    """The committed list: why each (rule, party) may fail for the reference, and the script that shows it."""
    return {(f["rule"], Party(f["party"])): f"{f['why']} ({f['script']})" for f in _committed()}


@cache
def _committed() -> list[dict[str, Any]]:
    text = (Path(__file__).with_name("findings.toml")).read_text(encoding="utf-8")
    listed: list[dict[str, Any]] = tomllib.loads(text)["finding"]
    return listed


def settle(result: Result, implementation: str) -> Result:
    """The result, excused where every failure has a committed finding: it is then reported and not counted.

    A finding excuses the reference; one with ``decides_model = false`` excuses every implementation, and one with
    ``where`` only failures of that name.
    """
    if result.status is not Status.FAIL:
        return result
    excuses = [_excuse(result.rule, failure, implementation) for failure in result.failures]
    if "" in excuses:
        return result
    return dataclasses.replace(result, finding=excuses[0])


def _excuse(rule: str, failure: Observation, implementation: str) -> str:
    for finding in _committed():
        mine = (finding["rule"], finding["party"]) == (rule, failure.party.value)
        here = finding.get("where", failure.where) == failure.where
        if mine and here and (implementation == REFERENCE or not finding.get("decides_model", True)):
            return f"{finding['why']} ({finding['script']})"
    return ""
