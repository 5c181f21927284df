"""What is a patch of a library's classes, modules and registries, and what is none."""

import pytest
from transformers.loss import loss_utils

from kbitcheck.observe.library_attributes import attributes, replaced


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
