"""A copy of a model has tables of its own, empty or not, and shares what the original shares."""

from collections import OrderedDict

import torch
from torch import nn

from kbitcheck.models.parametrized import deep_copy


def test_what_is_registered_on_a_copy_is_not_on_the_original() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].register_forward_hook(print)
    copied = deep_copy(model)
    for table in ("_forward_hooks", "_backward_hooks", "_non_persistent_buffers_set"):
        for mine, own in zip(copied.modules(), model.modules(), strict=True):
            assert getattr(mine, table) == getattr(own, table)
            assert type(getattr(mine, table)) is type(getattr(own, table))
            assert getattr(mine, table) is not getattr(own, table)
    copied[0].register_forward_pre_hook(print)
    copied[0].register_buffer("late", torch.zeros(1), persistent=False)
    assert not model[0]._forward_pre_hooks
    assert not model[0]._non_persistent_buffers_set


def test_an_empty_table_of_two_modules_is_one_in_the_copy_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shared: OrderedDict[str, int] = OrderedDict()
    for module in model:
        vars(module)["shared"] = shared
    vars(model)["plain"] = torch.zeros(3)  # no table, and neither true nor false
    copied = deep_copy(model)
    assert copied[0].shared is copied[1].shared
    assert copied[0].shared is not shared
