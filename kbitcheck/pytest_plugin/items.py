"""What ``--kbit-impl`` collects: a collector for each case, an item for each rule of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from kbitcheck.core.rule import Rule

if TYPE_CHECKING:
    from kbitcheck.core.cases import CaseSpec
    from kbitcheck.pytest_plugin.runner import Runner


def item_name(rule: Rule, spec: CaseSpec) -> str:
    """``KB303-layer-backward-exact[tiny:llama-nf4-reentrant]``."""
    return f"{rule.code}-{rule.name}[{spec.id}]"


class CaseCollector(pytest.Collector):
    """The rules of one case.

    Its node id takes the place of a file, so that ``--dist loadfile`` and ``loadscope`` keep a case on one worker.
    """

    def __init__(self, *, spec: CaseSpec, rules: Sequence[Rule], runner: Runner, **kwargs: Any) -> None:
        super().__init__(nodeid=f"kbitcheck/{spec.id}", **kwargs)
        self._spec, self._rules, self._runner = spec, rules, runner

    def collect(self) -> Iterator[pytest.Item]:
        for rule in self._rules:
            name = item_name(rule, self._spec)
            yield RuleItem.from_parent(self, name=name, rule=rule, spec=self._spec, runner=self._runner)


class RuleItem(pytest.Item):
    """One rule on one case."""

    def __init__(
        self, *, name: str, parent: pytest.Collector, rule: Rule, spec: CaseSpec, runner: Runner, **kwargs: Any
    ) -> None:
        # Given as text, pytest reads the brackets as parameters, as --lf does when it reads its cache.
        super().__init__(name=name, parent=parent, nodeid=f"{parent.nodeid}::{name}", **kwargs)
        self._rule, self._spec, self._runner = rule, spec, runner
        self.add_marker(pytest.mark.kbit(rule=rule.code, spec=spec))

    def runtest(self) -> None:
        self._runner.check(self, self._spec, self._rule.code)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The whole text once: under CI pytest's short summary would print all of it a second time."""
        shown = super().repr_failure(excinfo, style)
        if crash := getattr(shown, "reprcrash", None):
            crash.message = crash.message.partition("\n")[0]
        return shown

    def reportinfo(self) -> tuple[Any, None, str]:
        return self.path, None, self.name
