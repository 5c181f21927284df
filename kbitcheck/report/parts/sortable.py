"""A table that sorts and filters in a browser, as plain data; the page's macro draws it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell: its text, how grave it is (a class of the style sheet), what it sorts by where that is not its text, and where it leads."""

    text: str
    state: str = ""
    key: str = ""
    link: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sortable:
    """Rows as they stand before anyone sorts them; the first cell names its row.

    ``chosen`` are the columns that one can choose a value of; ``titles`` say more of a column. With ``cards`` a narrow screen shows
    each row as a card, a line a cell: what has sentences in its cells cannot be read column by column there.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    chosen: Sequence[str] = ()
    titles: Mapping[str, str] = field(default_factory=dict)
    cards: bool = False

    @property
    def choices(self) -> dict[int, list[str]]:
        """The values of each chosen column, by its number; none of a column that has one alone."""
        places = [self.columns.index(name) for name in self.chosen]
        values = {place: sorted({row[place].text for row in self.rows} - {""}) for place in places}
        return {place: of_column for place, of_column in values.items() if len(of_column) > 1}
