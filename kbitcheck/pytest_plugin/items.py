"""What ``--kbit-impl`` collects: a collector for each case, an item for each rule of the case."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.rule import Rule
from kbitcheck.pytest_plugin.specs import item_name

Check = Callable[[pytest.Item, CaseSpec, str], None]


class CaseCollector(pytest.Collector):
    """The rules of one case.

    Its node id takes the place of a file, so that ``--dist loadfile`` and ``loadscope`` keep a case on one worker.
    """

    def __init__(self, *, spec: CaseSpec, rules: Sequence[Rule], check: Check, **kwargs: Any) -> None:
        super().__init__(name=spec.id, nodeid=f"kbitcheck/{spec.id}", **kwargs)
        self._spec, self._rules, self._check = spec, rules, check

    def collect(self) -> Iterator[pytest.Item]:
        """One item for each rule."""
        for rule in self._rules:
            yield RuleItem.from_parent(self, rule=rule, spec=self._spec, check=self._check)


class RuleItem(pytest.Item):
    """One rule on one case."""

    def __init__(self, *, parent: pytest.Collector, rule: Rule, spec: CaseSpec, check: Check, **kwargs: Any) -> None:
        name = item_name(rule, spec)
        # Without a node id pytest would read the brackets as parameters, as --lf does when it reads its cache.
        super().__init__(name=name, parent=parent, nodeid=f"{parent.nodeid}::{name}", **kwargs)
        self._rule, self._spec, self._check = rule, spec, check
        self.add_marker(pytest.mark.kbit(rule=rule.code, spec=spec))

    def runtest(self) -> None:
        """Judge the rule."""
        self._check(self, self._spec, self._rule.code)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The whole text, and its first line for the short summary, which would print all of it again under CI."""
        shown = super().repr_failure(excinfo, style)
        if crash := getattr(shown, "reprcrash", None):
            crash.message = crash.message.partition("\n")[0]
        return shown

    def reportinfo(self) -> tuple[Any, None, str]:
        """The place that pytest shows."""
        return self.path, None, self.name
