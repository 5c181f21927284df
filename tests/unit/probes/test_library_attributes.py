"""What is a patch of a library, and that it is seen in every case, not in the first of a process alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import transformers
from transformers.loss import loss_utils

from kbitcheck.observe.library_attributes import attributes, replaced
from kbitcheck.observe.probes.call import call


def own(*args: Any) -> None:
    """Takes the place of another function."""


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (transformers.PreTrainedModel, "tie_weights"),
        (torch.nn.Linear, "forward"),
        (torch.utils.checkpoint, "checkpoint"),
    ],
)
def test_every_call_names_what_it_replaced(owner: Any, name: str, turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(model: torch.nn.Module) -> torch.nn.Module:
        monkeypatch.setattr(owner, name, own)
        return model

    _, facts = call(prepare, torch.nn.Bilinear(1, 1, 1), libraries=True)
    how = ("original", f"replaced by {__name__}.own")
    assert [(n.rpartition(".")[2], each) for n, each in facts.process.items()] == [(name, how)]


def test_what_has_no_name_is_said_to_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(model: torch.nn.Module) -> torch.nn.Module:
        monkeypatch.setattr(torch.nn.Linear, "forward", functools.partial(own))
        return model

    _, facts = call(prepare, torch.nn.Bilinear(1, 1, 1), libraries=True)
    assert facts.process == {"torch.nn.modules.linear.Linear.forward": ("original", "replaced")}


def test_an_attribute_that_is_added_to_a_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(model: torch.nn.Module) -> torch.nn.Module:
        monkeypatch.setattr(torch.nn.Linear, "prepared", "yes", raising=False)
        monkeypatch.setattr(torch.nn.Linear, "counter", 1, raising=False)
        return model

    _, facts = call(prepare, torch.nn.Bilinear(1, 1, 1), libraries=True)
    assert facts.process == {"torch.nn.modules.linear.Linear.prepared": ("absent", "added")}


def test_a_call_that_replaces_nothing_changes_nothing() -> None:
    assert call(lambda model: model, torch.nn.Linear(1, 1), libraries=True)[1].process == {}


def test_what_a_class_has_found_out_of_itself_is_no_patch_of_it() -> None:
    class Model:
        shared: bool

    before = attributes(of=[Model], libraries=False)
    Model._can_hold_experts_cached_value = False  # type: ignore[attr-defined]
    assert replaced(before) == {}
    Model.shared = False
    assert list(replaced(before)) == [f"{Model.__module__}.{Model.__qualname__}.shared"]


def test_an_entry_of_a_registry_that_is_replaced_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = attributes(libraries=False)
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", attributes)
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForSomethingNew", attributes)
    ((name, (was, how)),) = replaced(before).items()
    assert name.endswith(".LOSS_MAPPING['ForCausalLM']")
    assert (was, how) == ("original", "replaced by kbitcheck.observe.library_attributes.attributes")
    monkeypatch.undo()
    assert replaced(before) == {}
