"""``kbitcheck env``."""

import json
from dataclasses import dataclass

from kbitcheck.cli.options import choice, option
from kbitcheck.core.report import EXIT_CONFORMS
from kbitcheck.report.output_file import OutputFile
from kbitcheck.run.environment import environment, lines


@dataclass(frozen=True, kw_only=True)
class Options:
    format: str = choice("How to print it.", "text", ("text", "json"))
    output: str = option("Write it to this file instead of stdout.", "", metavar="FILE")
    debug: bool = option("Show tracebacks.", False)


def run(options: Options) -> int:
    """Print what a report of a defect needs."""
    output = OutputFile(options.output)
    values = environment()
    output.write((json.dumps(values, indent=2) if options.format == "json" else "\n".join(lines(values))) + "\n")
    return EXIT_CONFORMS
