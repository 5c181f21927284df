"""``kbitcheck backends``."""

from dataclasses import dataclass

from kbitcheck.cli.options import choice, option
from kbitcheck.core.report import EXIT_CONFORMS
from kbitcheck.report.output_file import OutputFile
from kbitcheck.report.tables.methods import FORMATS, render
from kbitcheck.run.methods import methods


@dataclass(frozen=True, kw_only=True)
class Options:
    format: str = choice("How to render the table.", "text", FORMATS)
    output: str = option("Write the table to this file.", "", metavar="FILE")
    debug: bool = option("Show tracebacks.", False)


def run(options: Options) -> int:
    """Print what transformers, PEFT and kbitcheck do with each quantization method on this machine."""
    output = OutputFile(options.output)
    output.write(render(methods(), options.format))
    return EXIT_CONFORMS
