"""One call of an implementation, observed: what it takes, what it gives back, what it says, what else it changes."""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn

from kbitcheck.core.errors import Raised
from kbitcheck.core.facts import CallFacts
from kbitcheck.observe.library_attributes import attributes, classes_of, replaced
from kbitcheck.observe.probes import process_state
from kbitcheck.observe.probes.runtime_settings import loggers, loggers_changed

Prepare = Callable[..., Any]

SECOND, THIRD = "use_gradient_checkpointing", "gradient_checkpointing_kwargs"


def signature(prepare: Prepare) -> tuple[dict[str, str] | None, bool]:
    """Parameter names with the text of their defaults ("" for none; None: unreadable), and whether any keyword is accepted."""
    try:
        parameters = inspect.signature(prepare).parameters.values()
    except (TypeError, ValueError):
        return None, True
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return {p.name: "" if p.default is p.empty else repr(p.default) for p in named}, anything


def arguments(prepare: Prepare, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the wanted keyword arguments that the implementation takes: an older one is run with what it has."""
    parameters, anything = signature(prepare)
    return {k: v for k, v in wanted.items() if anything or k in (parameters or ())}


def model_from(returned: Any, passed: Any) -> Any:
    """What a call returned if it is a model; otherwise the model that was passed in."""
    return returned if isinstance(returned, nn.Module) else passed


@contextmanager
def _logged() -> Iterator[list[str]]:
    """The warnings that are logged while the context is open; each goes on to where it goes."""
    messages: list[str] = []
    own = logging.Logger.callHandlers

    def handle(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            messages.append(str(record.msg))
        own(logger, record)

    with mock.patch.object(logging.Logger, "callHandlers", handle):
        yield messages


def call(
    prepare: Prepare, model: nn.Module, *positional: Any, libraries: bool = False, **wanted: Any
) -> tuple[Any, CallFacts]:
    """Call ``prepare``; the model that comes of it, and the facts of the call.

    ``libraries`` compares all classes and functions of the libraries used in training, not the model's classes alone.
    """
    parameters, anything = signature(prepare)
    kwargs = arguments(prepare, wanted)
    kwargs_before = repr(kwargs.get(THIRD))
    original = attributes(of=classes_of(model), libraries=libraries)
    cls, modes = type(model), {name: module.training for name, module in model.named_modules()}
    raised, returned = None, None
    with warnings.catch_warnings(record=True) as heard, _logged() as logged:
        warnings.simplefilter("always")
        before, of_loggers = process_state.state(), loggers()
        try:
            returned = prepare(model, *positional, **kwargs)
        except Exception as error:
            raised = Raised.of(error)
        after, turned = process_state.state(), loggers_changed(of_loggers)
    return model_from(returned, model), CallFacts(
        raised=raised,
        same_object=returned is model,
        returned=type(returned).__name__,
        warnings=tuple(f"{w.category.__name__}: {w.message}".splitlines()[0] for w in heard),
        logged=tuple(logged),
        kwargs_before=kwargs_before,
        kwargs_after=repr(kwargs.get(THIRD)),
        class_kept=type(model) is cls,
        checkpoints=any(getattr(m, "gradient_checkpointing", False) is True for m in model.modules()),
        modes_changed=tuple(
            n or cls.__name__ for n, m in model.named_modules() if modes.get(n, m.training) != m.training
        ),
        process={**process_state.changed(before, after), **turned, **replaced(original)},
        parameters=parameters,
        accepts_any=anything,
    )
