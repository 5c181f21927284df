"""The pytest plugin: one test for each rule and case.

``pytest --kbit-impl mypkg:prepare`` collects them without a line of code; in a test module, request ``kbit_check`` and
call it. pytest loads it in every run where kbitcheck is installed, so it imports little, and the rest on use.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from kbitcheck.core.cases import CaseSpec
from kbitcheck.pytest_plugin import options
from kbitcheck.pytest_plugin.controller import Controller
from kbitcheck.pytest_plugin.runner import Runner

__all__ = ["pytest_addoption", "pytest_configure", "pytest_generate_tests"]

RUNNER = pytest.StashKey[Runner]()


def pytest_addoption(parser: pytest.Parser) -> None:
    options.declare(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kbit: a conformance check of kbitcheck, one rule on one case")
    runner = config.stash[RUNNER] = Runner(config)
    config.pluginmanager.register(runner, "kbitcheck-runner")
    if not hasattr(config, "workerinput"):
        controller = Controller(runner.settings, runner.plan, runner.folder)
        config.pluginmanager.register(controller, "kbitcheck-controller")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kbit_check" in metafunc.fixturenames:
        metafunc.config.stash[RUNNER].parametrize(metafunc)


@pytest.fixture
def kbit_option_case(request: pytest.FixtureRequest) -> CaseSpec:
    """One case of the ``--kbit-*`` options; a test that requests it is run for each of them."""
    spec: CaseSpec = request.param
    return spec


@pytest.fixture
def kbit_case(kbit_option_case: CaseSpec) -> CaseSpec:
    """The case that ``kbit_check`` judges: override it to return your own ``kbitcheck.testing.case(...)``."""
    return kbit_option_case


@pytest.fixture
def kbit_check(request: pytest.FixtureRequest, kbit_case: Any) -> Callable[[], None]:
    """Judges one rule on ``kbit_case`` when called: fails, skips, or returns."""
    runner = request.config.stash[RUNNER]
    return lambda: runner.check(request.node, kbit_case, request.param)


@pytest.fixture
def kbit_watch() -> Callable[..., AbstractContextManager[Any]]:
    """Makes a context that fails the test unless the training steps inside conform.

    Its arguments, model and optimizer, are those of ``kbitcheck.watch``.
    """

    @contextmanager
    def watching(*arguments: Any, **options: Any) -> Iterator[Any]:
        import kbitcheck

        __tracebackhide__ = True
        with kbitcheck.watch(*arguments, **options) as watched:
            yield watched
        watched.raise_for_failures()

    return watching
