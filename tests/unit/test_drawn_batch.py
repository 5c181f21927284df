"""A batch is drawn that the base runs on, and only what hangs on it is said of it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from kbitcheck.core.cases import CaseSpec, WitnessSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import BlockwiseFacts
from kbitcheck.models.inputs.drawn import Conditions
from kbitcheck.observe.drawn_batch import against_plain, drawn_batch, unless_base_raises
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.probes.gap import gap

SPEC = CaseSpec(model="tiny:gpt2", quant="nf4", implementation="reference")


class Source:
    """Makes batches of at most so many tokens, as a model's own code may."""

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def batch(self, model: nn.Module, *, batch: int, seq_len: int, seed: int) -> dict[str, Tensor]:
        if seq_len > self.longest:
            raise IndexError(f"{seq_len} tokens")
        ids = torch.ones(batch, seq_len, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids.clone(), "labels": ids.clone()}


def loaded(longest: int) -> Loaded:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=longest)).eval()
    made: Any = SimpleNamespace(
        source=Source(longest), pristine=model, copy=lambda: model, large=False, training=SimpleNamespace(batch=None)
    )
    made.pristine.config.n_positions = 1024  # what the configuration states is more than the code takes
    return cast(Loaded, made)


def test_a_shorter_batch_is_drawn_where_the_model_runs_on_none_of_the_drawn_length() -> None:
    conditions, batch = drawn_batch(loaded(longest=40), SPEC)
    assert batch["input_ids"].shape == (conditions.rows, conditions.length)
    assert conditions.length <= 40


def test_without_any_batch_the_reason_is_the_model_s_own() -> None:
    with pytest.raises(Unavailable, match=r"runs on no batch that is drawn: IndexError: \d+ tokens"):
        drawn_batch(loaded(longest=4), SPEC)


def _run(subject: Loaded, tokens: int) -> None:
    with unless_base_raises(subject, {"input_ids": torch.ones(1, tokens, dtype=torch.int64)}):
        raise ValueError("the prepared model raised")


def test_what_the_base_does_not_run_on_is_not_the_preparation_s() -> None:
    with pytest.raises(Unavailable, match="the unprepared base does not run on the drawn batch either"):
        _run(loaded(longest=40), tokens=41)


def test_what_the_base_runs_on_is() -> None:
    with pytest.raises(ValueError, match="the prepared model raised"):
        _run(loaded(longest=40), tokens=40)


def test_an_adapter_without_a_gradient_on_any_batch_is_no_fault_of_the_drawn_one() -> None:
    one = torch.ones(2)
    gaps = {name: gap(one, one.double(), one) for name in ("dead", "cut", "live")}
    blockwise = BlockwiseFacts(parts={}, adapters=gaps)
    seen = against_plain(
        checkpointed={"dead": None, "cut": None, "live": one},
        plain={"dead": one, "cut": one, "live": one},
        usual={"dead": None, "cut": one, "live": one},
        blockwise=blockwise,
    )
    assert {name: distance.equal for name, distance in seen.items()} == {"cut": False, "live": True}


def test_a_fresh_adapter_s_first_matrix_is_compared_where_its_second_has_a_gradient() -> None:
    one, names = torch.ones(2), ("q_proj.lora_A.weight", "q_proj.lora_B.weight")
    blockwise = BlockwiseFacts(parts={}, adapters={name: gap(one, one.double(), one) for name in names})
    usual: dict[str, Tensor | None] = dict(zip(names, (torch.zeros(2), one), strict=True))
    plain: dict[str, Tensor | None] = dict.fromkeys(names, one)
    seen = against_plain({names[0]: None, names[1]: one}, plain, usual, blockwise)
    assert {name: distance.equal for name, distance in seen.items()} == dict(zip(names, (False, True), strict=True))


def test_a_witness_draws_what_its_case_draws() -> None:
    case = replace(SPEC, checkpointing="reentrant")
    witness = WitnessSpec.of(case, implementation="cast_alone", checkpointing="off")
    assert (witness.model, witness.checkpointing, witness.implementation) == (case.model, "off", "cast_alone")
    like: dict[str, Any] = {"limit": 1024, "large": False}
    assert Conditions.of_case(witness, **like) == Conditions.of_case(case, **like)
    assert Conditions.of_case(replace(case, checkpointing="off"), **like) != Conditions.of_case(case, **like)
    assert replace(witness, profile="qlora").entropy == case.entropy
