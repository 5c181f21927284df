"""Which finding explains a failure, and whether it excuses the implementation."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from kbitcheck.core.cases import REFERENCE, CaseSpec
from kbitcheck.core.finding import Finding, read_findings
from kbitcheck.core.result import Result, Status


@cache
def findings() -> tuple[Finding, ...]:
    """The findings that belong to no backend."""
    return read_findings(Path(__file__).with_name("findings.toml"))


def settle(result: Result, spec: CaseSpec, environment: Mapping[str, Any], listed: Sequence[Finding]) -> Result:
    """The result, excused where a finding explains each of its failures: it is then reported and not counted.

    A finding excuses the reference; one that does not decide ``kbitcheck model`` excuses every implementation.
    """
    if result.status is not Status.FAIL:
        return result
    eligible = [finding for finding in listed if spec.implementation == REFERENCE or not finding.decides_model]
    explanations = [
        next((f for f in eligible if f.explains(result.rule, failure, spec, environment)), None)
        for failure in result.failures
    ]
    first = explanations[0]
    return result if first is None or None in explanations else dataclasses.replace(result, finding=first.line)
