"""What PEFT imports where it meets a layer is imported before an implementation is judged, and the model stays as it is."""

from typing import Any
from unittest import mock

import peft
import pytest
import torch
from peft.tuners.lora import model as injected

from kbitcheck.core.cases import CaseSpec, Implementation
from kbitcheck.observe import open_case as opening
from kbitcheck.observe.loaded import loaded_model
from kbitcheck.observe.probes.adapters import let_peft_import
from kbitcheck.observe.probes.snapshot import snapshot

SPEC = CaseSpec(model="tiny:llama", quant="nf4", implementation="reference")


def test_the_model_and_random_numbers_stay_as_they_are() -> None:
    loaded = loaded_model(SPEC)
    before, state = snapshot(loaded.pristine), torch.get_rng_state()
    with mock.patch.object(peft, "get_peft_model", wraps=peft.get_peft_model) as put:
        let_peft_import(loaded.pristine, loaded.targets)
    assert put.call_count == 1
    assert snapshot(loaded.pristine) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_what_peft_refuses_is_not_told_here() -> None:
    with mock.patch.object(peft, "get_peft_model", side_effect=ValueError) as put:
        let_peft_import(loaded_model(SPEC).pristine, loaded_model(SPEC).targets)
    assert put.call_count == 1


@pytest.mark.parametrize("earlier", [True, False])
def test_what_an_import_of_peft_s_does_is_no_effect_of_the_implementation(monkeypatch, earlier: bool) -> None:
    loaded, create = loaded_model(SPEC), injected.LoraModel._create_new_module

    def creates(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setenv("SET_BY_A_PACKAGE", "1")  # as the import of a quantizer's package does
        return create(*args, **kwargs)

    monkeypatch.setattr(injected.LoraModel, "_create_new_module", staticmethod(creates))
    if not earlier:
        monkeypatch.setattr(opening, "let_peft_import", lambda *_: None)
    case = opening.open_case(SPEC, Implementation(name="identity", function=lambda model, *_, **__: model))
    let_peft_import(loaded.pristine, loaded.targets)
    assert bool(case.lasting) is not earlier
