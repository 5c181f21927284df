"""Modules with parametrized parameters, whose classes torch makes."""

import copy
from typing import Any

from torch.nn.utils.parametrize import is_parametrized


def deep_copy(model: Any) -> Any:
    """A deep copy whose parametrized modules have classes of their own.

    torch gives each such module a class that reads its parameters; copies share it, and a parametrization that is removed from one
    copy leaves the others unreadable.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        cls = type(module)
        if is_parametrized(module):
            module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
    return copied
