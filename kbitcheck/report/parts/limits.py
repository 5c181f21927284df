"""How much of a report is shown. Every format keeps to the same limits; ``-v`` lifts them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

ENDING = 100  # characters: a long message ends with the place that raised it


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many of each are shown under one rule."""

    variants: int  # ways in which the rule failed
    cases: int  # in which it failed in one way
    deviations: int  # of one way
    places: int  # names, or groups of names, of one deviation
    characters: int  # of one text

    def text(self, text: str) -> str:
        """The text on one line; a long one without its middle."""
        text = " ".join(text.split())
        rest = self.characters - ENDING - 3
        return text if len(text) <= self.characters else f"{text[:rest]} … {text[-ENDING:]}"


SHORT = Limits(variants=1, cases=2, deviations=1, places=2, characters=200)  # of a table's cell
BRIEF = Limits(variants=3, cases=4, deviations=3, places=8, characters=400)
NONE = Limits(**dict.fromkeys(Limits.__slots__, sys.maxsize))


def listed(names: Sequence[str], limit: int) -> str:
    """The names with commas between them, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f", and {rest} more" if rest > 0 else "")
