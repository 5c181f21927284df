"""Progress in a notebook: what a cell shows while it runs, and that nothing is shown anywhere else."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kbitcheck.core.events import Computing, Judged, Loaded, Started
from kbitcheck.core.result import Status
from kbitcheck.run import notebook_progress
from tests.ledger.reports import NF4, result


@dataclass
class Output:
    """A cell's output: every state that it had."""

    shown: list[str] = field(default_factory=list)

    def display(self, html: str, *, display_id: bool) -> Output:
        assert display_id
        self.shown.append(html)
        return self

    def update(self, html: str) -> None:
        self.shown.append(html)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Output:
    """The output of a cell in a kernel that stands in for IPython's."""
    output, package, display = Output(), ModuleType("IPython"), ModuleType("IPython.display")
    package.__dict__.update(get_ipython=lambda: SimpleNamespace(kernel=object()), display=display)
    display.__dict__.update(HTML=str, display=output.display)
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(notebook_progress, "PAUSE", 0.0)
    return output


def judged() -> Judged:
    return Judged(result=result("KB101", NF4, Status.PASS))


def test_a_cell_shows_how_far_it_is_and_is_empty_at_the_end(cell: Output) -> None:
    with notebook_progress.notebook_progress(2) as advance:
        advance(Started(case="<tiny>"))
        advance(Computing(case="c", fact="gradients", left=7.4))
        advance(judged())
        advance(Loaded())
    starting, started, computing, first, last = cell.shown
    assert 'max="2" value="0"' in starting
    assert "0 of 2 · &lt;tiny&gt; · " in started
    assert "0 of 2 · c: gradients, about 7 s left in this case · " in computing
    assert 'value="1"' in first
    assert last == ""


def test_a_browser_gets_no_more_than_it_can_show(cell: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook_progress, "PAUSE", 3600.0)
    with notebook_progress.notebook_progress(9) as advance:
        for _ in range(9):
            advance(judged())
    assert len(cell.shown) == 2


def test_the_output_is_emptied_after_an_exception_too(cell: Output) -> None:
    with pytest.raises(KeyboardInterrupt), notebook_progress.notebook_progress(1):
        raise KeyboardInterrupt
    assert cell.shown[-1] == ""


@pytest.mark.parametrize("shell", [None, SimpleNamespace()], ids=["no shell", "a terminal's shell"])
def test_elsewhere_nothing_is_shown(shell: Any, cell: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: shell, raising=False)
    with notebook_progress.notebook_progress(1) as advance:
        advance(judged())
    monkeypatch.delitem(sys.modules, "IPython")
    assert not notebook_progress.in_notebook()
    assert cell.shown == []
