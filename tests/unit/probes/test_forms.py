"""Forms of a call: each is what it says, gives a loss with the graph of the model, and is drawn where the base takes it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from kbitcheck.core.cases import CaseSpec
from kbitcheck.observe.drawn_form import called, in_drawn_form
from kbitcheck.observe.probes import step
from kbitcheck.observe.probes.forms import FORMS, PLAIN, Formed

SPEC = CaseSpec(model="tiny:gpt2", quant="nf4", implementation="reference", conditions="all")
MODEL = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=16))
IDS = torch.arange(12).reshape(2, 6)
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS.clone()}
BY_NAME = {form.name: form for form in FORMS}
# What changes the loss: another number of tokens in the mean, the logits' own loss, or tokens that do not see each other.
OTHER_LOSSES = {"num_items_in_batch", "no labels", "logits_to_keep"}


@pytest.mark.parametrize("name", [form.name for form in FORMS])
def test_each_form_gives_the_loss_of_the_batch_with_its_graph(name: str) -> None:
    form = BY_NAME[name]
    assert form.reason
    assert form.taken_by(MODEL, BATCH)
    MODEL.eval()
    _, loss = step.forward(MODEL, Formed(BATCH, form))
    plain = MODEL(**BATCH).loss
    assert loss.requires_grad
    assert torch.allclose(loss, plain, rtol=1e-5) is (name not in OTHER_LOSSES)


def test_the_forms_are_what_they_are_called() -> None:
    def keywords(name: str) -> Any:
        return BY_NAME[name].inputs(MODEL, dict(BATCH))

    assert "input_ids" not in keywords("embeddings")
    assert keywords("embeddings")["inputs_embeds"].shape == (2, 6, 8)
    assert keywords("a mask of booleans")["attention_mask"].dtype is torch.bool
    assert keywords("a mask of floats")["attention_mask"].dtype is torch.float32
    assert keywords("a wide mask")["attention_mask"].shape == (2, 1, 6, 6)
    views = keywords("views of short integers")["input_ids"]
    assert views.dtype is torch.int32
    assert not views.is_contiguous()
    assert views.equal(IDS.int())
    left = {**BATCH, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    assert BY_NAME["position ids"].inputs(MODEL, left)["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3], [*range(6)]]
    assert "labels" not in keywords("no labels")
    assert "attention_mask" not in keywords("no mask")


def test_positional_arguments_are_those_with_which_the_forward_begins() -> None:
    class Two(nn.Module):
        def forward(self, input_ids: Tensor, past: Any = None, labels: Tensor | None = None) -> Any:
            self.got = input_ids, past, labels
            return SimpleNamespace(loss=input_ids.sum())

    model = Two()
    BY_NAME["positional arguments"].output(model, {"input_ids": IDS, "labels": IDS})
    assert model.got[0] is IDS
    assert model.got[1] is None
    assert model.got[2] is IDS


def test_a_form_is_for_models_that_take_its_keyword() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor, labels: Tensor) -> None: ...

    taken = {form.name for form in FORMS if form.taken_by(Plain(), {"input_ids": IDS, "labels": IDS})}
    assert taken == {PLAIN.name, "no labels", "positional arguments", "views of short integers"}


def loaded(model: Any = MODEL, **own: Any) -> Any:
    return SimpleNamespace(**{
        "pristine": model, "copy": lambda: model, "copies": True, "reads_labels": False, "large": False, "of_large": False, **own,
    })  # fmt: skip


def test_every_form_that_a_twin_takes_is_drawn_and_each_seed_repeats() -> None:
    drawn = [in_drawn_form(loaded(), replace(SPEC, seed=seed), BATCH) for seed in range(120)]
    names = {batch.form.name if isinstance(batch, Formed) else PLAIN.name for batch in drawn}
    assert names == {form.name for form in FORMS if form.exact}
    assert called(drawn[5]) == called(in_drawn_form(loaded(), replace(SPEC, seed=5), BATCH))
    assert {called(batch) for batch in drawn if not isinstance(batch, Formed)} == {""}


def test_cases_that_share_conditions_begin_at_a_form_each() -> None:
    forms = {called(in_drawn_form(loaded(), replace(SPEC, conditions=f"{n}/9"), BATCH)) for n in (1, 4, 7)}
    assert len(forms) == 3


@pytest.mark.parametrize("own", [{"copies": False}, {"reads_labels": True}, {"large": True}, {"of_large": True}])
def test_a_caller_s_call_and_a_large_model_s_stay(own: dict[str, Any]) -> None:
    assert all(in_drawn_form(loaded(**own), replace(SPEC, seed=seed), BATCH) is BATCH for seed in range(9))


def test_what_the_base_refuses_is_not_drawn() -> None:
    class Strict(GPT2LMHeadModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs.keys() != BATCH.keys() or kwargs["attention_mask"].dtype != torch.int64:
                raise TypeError("not so")
            return super().forward(**kwargs)

    drawn = [in_drawn_form(loaded(Strict(MODEL.config)), replace(SPEC, seed=seed), BATCH) for seed in range(9)]
    assert {called(batch) for batch in drawn} <= {"", ", called with views of short integers"}
