"""Sees each call that switches gradient checkpointing on. Imports little: it looks from a script's first line on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Self

from kbitcheck.core.facts import SwitchedOn
from kbitcheck.observe import internals

METHODS = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


class Enabling:
    """While it is entered, tells ``seen`` of each such call. ``cls`` is transformers' ``PreTrainedModel``."""

    def __init__(self, cls: Any, seen: Callable[[SwitchedOn], object]) -> None:
        self._cls, self._seen = cls, seen
        self._depth = 0
        self._own: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._own = {name: vars(self._cls)[name] for name in METHODS if name in vars(self._cls)}
        for name, method in self._own.items():
            setattr(self._cls, name, self._around(method))
        return self

    def __exit__(self, *error: object) -> None:
        for name, method in self._own.items():
            setattr(self._cls, name, method)

    def _around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def enable(model: Any, *args: Any, **kwargs: Any) -> Any:
            self._depth += 1  # one method calls the other
            try:
                answer = method(model, *args, **kwargs)
            finally:
                self._depth -= 1
            if not self._depth:
                self._seen(SwitchedOn(passed=_passed(args, kwargs), used=arguments(model)))
            return answer

        return enable


def arguments(model: Any) -> dict[str, str]:
    """The arguments that a model's modules pass on to torch's checkpoint; empty where checkpointing is off."""
    on = (m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True)
    functions = filter(None, (internals.checkpoint_function(m) for m in on))
    bare = map(inspect.unwrap, functions)  # LLaMA-Factory wraps it
    keywords = (f.keywords for f in bare if isinstance(f, functools.partial))
    return internals.as_text(next(keywords, {}))


def _passed(args: Any, kwargs: Mapping[str, Any]) -> frozenset[str]:
    values = [*args[:1], *(value for name, value in kwargs.items() if name.endswith("checkpointing_kwargs"))]
    return frozenset(map(str, values[0])) if values and isinstance(values[0], Mapping) else frozenset()
