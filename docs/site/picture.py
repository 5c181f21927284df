"""Writes ``docs/images/report.svg`` from the saved report; with ``--check`` only says whether it is up to date."""

from __future__ import annotations

import io
import re
import sys
import textwrap

import other_pages
from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

from kbitcheck.report import text

PICTURE = other_pages.ROOT / "docs" / "images" / "report.svg"
WIDTH = 100  # columns
# A picture loads nothing from elsewhere: fonts are the reader's own.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace(
    "font-family: Fira Code, monospace", "font-family: ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
)


def svg() -> str:
    """The saved report as a terminal shows it, up to what does not count."""
    report = other_pages.sample()
    (spec,) = report.subject["cases"].values()
    command = f"$ kbitcheck impl {spec['implementation']} --model {spec['model']} --quant {spec['quant']}"
    console = Console(file=io.StringIO(), record=True, width=WIDTH, force_terminal=True, highlight=False)
    console.print(Text(f"{command} --checkpointing {spec['checkpointing']}\n", style="bold"))
    shown = text.lines(report, width=WIDTH)
    first_warning = next(n for n, (line, _) in enumerate(shown) if line.startswith("! "))
    for line, style in shown[:first_warning]:
        for part in textwrap.wrap(line, WIDTH, subsequent_indent=" " * 11, break_on_hyphens=False) or [""]:
            console.print(Text(part, style=style))
    warnings = sum(line.startswith("! ") for line, _ in shown)
    console.print(Text(f"… {warnings} warnings, each with the same parts", style="dim"))
    picture = console.export_svg(title="kbitcheck", code_format=FORMAT, unique_id="report")
    return "".join(f"{line.rstrip()}\n" for line in picture.splitlines())


def main(arguments: list[str]) -> int:
    """Write the picture, or with ``--check`` return 1 where it has drifted."""
    if "--check" not in arguments:
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_text(svg(), encoding="utf-8")
        return 0
    drifted = PICTURE.read_text(encoding="utf-8") != svg()
    if drifted:
        print(f"{PICTURE.name} has drifted; run `python docs/site/picture.py`", file=sys.stderr)
    return int(drifted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
