"""Keeps what looks at a run from harming it: whatever a hook raises ends the watching, and not the run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

from kbitcheck.core.errors import cause
from kbitcheck.observe.in_place import random_states_restored
from kbitcheck.observe.watch import LENT

F = TypeVar("F", bound=Callable[..., Any])


class Guarded(Protocol):
    """What watches a run. ``busy``: one of its callbacks runs."""

    model: nn.Module
    over: bool
    busy: bool
    by_check: bool

    def fail(self, why: str) -> None: ...


class Guard:
    """Makes hooks that only look out of functions that may raise."""

    def __init__(self, watcher: Guarded | None = None) -> None:
        self._watcher = watcher

    def __call__(self, hook: Callable[..., object]) -> Callable[..., None]:
        """The hook, which returns nothing and raises nothing."""
        watcher = self._watcher

        def guarded(*args: Any, **kwargs: Any) -> None:
            if watcher is None:
                hook(*args, **kwargs)
            elif not watcher.over:
                try:
                    hook(*args, **kwargs)
                except Exception as error:
                    watcher.fail(cause(error))

        return guarded


def take_off(handle: Any, *, running: bool = True) -> None:
    """Take a hook off all optimizers' steps. While such hooks are ``running``, one that others stand behind stays, and must do nothing.

    torch calls them in a loop over the dictionary that has them, which raises in the user's run if one is removed before the last.
    """
    hooks = handle.hooks_dict_ref()
    if not running or not hooks or next(reversed(hooks)) == handle.id:
        handle.remove()


def unharmed(method: F) -> F:
    """A callback of a watcher, guarded, that runs by itself alone and leaves random states as they are."""

    @functools.wraps(method)
    def guarded(self: Guarded, *args: Any, **kwargs: Any) -> None:
        if self.over or self.busy or (LENT in vars(self.model) and not self.by_check):
            return
        self.busy = True
        try:
            with random_states_restored(), torch.compiler.set_stance("force_eager"):
                method(self, *args, **kwargs)
        except Exception as error:
            self.fail(cause(error))
        finally:
            self.busy = False

    return cast(F, torch.compiler.disable(guarded))  # hooks of a compiled model are part of what is compiled
