"""``kbitcheck rules``."""

import os
from dataclasses import dataclass

from kbitcheck.cli.options import argument, option
from kbitcheck.core.report import EXIT_CONFORMS
from kbitcheck.core.rule import select
from kbitcheck.report.output_file import OutputFile
from kbitcheck.report.rule_page import index, page


@dataclass(frozen=True, kw_only=True)
class Options:
    code: str = argument("[CODE]", "A code or a prefix.", default="", nargs="?")
    no_pager: bool = option("Print a rule's page at once, on a terminal too.", False)
    debug: bool = option("Show tracebacks.", False)


def run(options: Options) -> int:
    """Print the index of the rules, or the page of the one that the code selects."""
    rules = select([options.code] if options.code else [], about=None)
    one = len(rules) == 1 and bool(options.code)
    text = page(rules[0]) if one else index(rules)
    if one and not options.no_pager and OutputFile("").terminal:
        from pydoc import pager  # PAGER, or less where there is one; a page that fits the screen is not paged

        os.environ.setdefault("LESS", "FRX")
        pager(text)
    else:
        OutputFile("").write(text)
    return EXIT_CONFORMS
