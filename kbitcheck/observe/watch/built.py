"""Notes the dtype in which optimizers take parameters. Imports little: it notes from a script's first line on."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import wraps
from typing import Any, Self

import torch


class Built:
    """While it is entered, notes the dtype of each parameter that an optimizer is built with, or is passed later."""

    def __init__(self) -> None:
        self._dtypes: dict[int, tuple[Any, torch.dtype]] = {}  # by the parameter's ``id``, with a reference to it
        self._own: Any = None

    def __enter__(self) -> Self:
        own = self._own = torch.optim.Optimizer.add_param_group

        @wraps(own)
        def add(optimizer: Any, group: Any) -> None:
            own(optimizer, group)
            self.note(optimizer.param_groups[-1]["params"])

        torch.optim.Optimizer.add_param_group = add  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: object) -> None:
        torch.optim.Optimizer.add_param_group = self._own  # type: ignore[method-assign]

    def note(self, parameters: Iterable[torch.Tensor]) -> None:
        """Note the dtypes of parameters of which none is noted yet."""
        for parameter in parameters:
            if self.dtype(parameter) is None:
                self._dtypes[id(parameter)] = weakref.ref(parameter), parameter.dtype

    def dtype(self, parameter: torch.Tensor) -> torch.dtype | None:
        """The noted dtype of a parameter."""
        reference, dtype = self._dtypes.get(id(parameter), (None, None))
        return dtype if reference is not None and reference() is parameter else None
