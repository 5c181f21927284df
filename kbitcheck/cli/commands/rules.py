"""``kbitcheck rules``."""

from dataclasses import dataclass

from kbitcheck.cli.options import argument, option
from kbitcheck.core.report import EXIT_CONFORMS
from kbitcheck.core.rule import select
from kbitcheck.report.output_file import OutputFile
from kbitcheck.report.rule_page import index, page


@dataclass(frozen=True, kw_only=True)
class Options:
    code: str = argument("[CODE]", "A code or a prefix.", default="", nargs="?")
    debug: bool = option("Show tracebacks.", False)


def run(options: Options) -> int:
    """Print the index of the rules, or the page of the one that the code selects."""
    rules = select([options.code] if options.code else [], about=None)
    OutputFile("").write(page(rules[0]) if len(rules) == 1 and options.code else index(rules))
    return EXIT_CONFORMS
