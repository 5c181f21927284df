"""The report as JSON: what ``kbitcheck show`` reads back."""

from __future__ import annotations

import json

from kbitcheck.core import Report


def render(report: Report) -> str:
    """One JSON object, in ASCII, so that any terminal and encoding takes it."""
    return json.dumps(report.as_json(), indent=2) + "\n"
