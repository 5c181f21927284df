"""The report as JSON: what ``kbitcheck show`` reads back."""

import json

from kbitcheck.core.report import Report


def render(report: Report) -> str:
    """One JSON object with a line for each part and each result, in ASCII, so that any terminal and encoding takes it."""
    parts = []
    for key, value in report.as_json().items():
        text = _compact(value)
        if key == "results" and value:
            text = "[\n" + ",\n".join(f"    {_compact(row)}" for row in value) + "\n  ]"
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
