"""A folder of reports, a JSON file for each thing that was judged."""

import re
from collections.abc import Iterable
from pathlib import Path

from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import Report
from kbitcheck.report.json import render
from kbitcheck.report.output_file import replace_file

UNFIT = re.compile(r"[^a-z0-9._=]+")


def file_name(title: str) -> str:
    """What the report of ``title`` is called, without an ending: letters, digits, dots and hyphens that every system takes."""
    return UNFIT.sub("-", title.lower()).strip("-.") or "report"


class ReportFolder:
    """The folder named by an option; made where it is not there.

    Raises:
        UsageError: it cannot be written to, or two ``titles`` would have one file; raised before anything is run.
    """

    def __init__(self, name: str, titles: Iterable[str], option: str = "--reports") -> None:
        self._path = Path(name) if name else None
        self._option = f"{option} {name}"
        taken: dict[str, str] = {}
        for title in titles if name else ():
            if (other := taken.setdefault(file_name(title), title)) != title:
                raise UsageError(
                    f"{self._option}: {other!r} and {title!r} would be one file; give one of them another name"
                )
        if self._path is not None:
            try:
                self._path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"cannot write {self._option}: {error.strerror}") from None

    def write(self, title: str, report: Report) -> None:
        """Write a report, in place of an earlier one of the same title; nothing where no folder was named.

        Raises:
            UsageError: the report cannot be written.
        """
        if self._path is None:
            return
        try:
            replace_file(self._path / f"{file_name(title)}.json", render(report))
        except OSError as error:
            raise UsageError(f"cannot write {self._option}: {error.strerror}") from None
