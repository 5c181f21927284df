"""The report as JSON: what ``kbitcheck show`` reads back."""

from __future__ import annotations

import json

from kbitcheck.core import Report


def render(report: Report) -> str:
    """One JSON object with a line for each result, in ASCII, so that any terminal and encoding takes it."""
    data = report.as_json()
    rows = ",\n".join(f"    {json.dumps(row)}" for row in data.pop("results"))
    head = json.dumps(data, indent=2).removesuffix("\n}")
    return f'{head},\n  "results": [\n{rows}\n  ]\n}}\n' if rows else f'{head},\n  "results": []\n}}\n'
