"""Modules with parametrized parameters, whose classes torch makes."""

import copy
from collections import OrderedDict
from typing import Any

from torch.nn.utils.parametrize import is_parametrized


def deep_copy(model: Any) -> Any:
    """A deep copy whose parametrized modules have classes of their own.

    torch gives each such module a class that reads its parameters; copies share it, and a parametrization that is removed from one
    copy leaves the others unreadable.
    """
    copied = copy.deepcopy(model, _empty_tables(model))
    for module in copied.modules():
        cls = type(module)
        if is_parametrized(module):
            module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
    return copied


def _empty_tables(model: Any) -> dict[int, Any]:
    """Copies of what is empty in modules, a dozen tables of hooks each, by id: ``deepcopy`` pickles every one of them."""
    tables = (table for module in model.modules() for table in vars(module).values())
    return {id(table): type(table)() for table in tables if type(table) in (OrderedDict, set) and not table}
