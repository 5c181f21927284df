"""A report as the JSON that badge services read: https://shields.io/badges/endpoint-badge."""

import json

from kbitcheck.core.report import EXIT_BROKEN_RULE, EXIT_CONFORMS, Report
from kbitcheck.report.parts.verdict import answer

COLORS = {EXIT_CONFORMS: "brightgreen", EXIT_BROKEN_RULE: "red"}
NEITHER = "lightgrey"  # interrupted, not judged, nothing checked


def render(report: Report) -> str:
    """The answer without its mark, and a colour that says it too."""
    message = answer(report).lstrip("✓✗ ")
    badge = {
        "schemaVersion": 1,
        "label": "kbitcheck",
        "message": message,
        "color": COLORS.get(report.exit_code, NEITHER),
    }
    return json.dumps(badge, ensure_ascii=False) + "\n"
