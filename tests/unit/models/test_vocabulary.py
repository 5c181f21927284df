"""Fewer tokens for a cut: how many, of which tables, and that what cannot be shortened keeps all of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kbitcheck.backends.quantization import Quantization
from kbitcheck.models import vocabulary
from kbitcheck.models.cut import NoCut
from kbitcheck.models.load import quiet
from kbitcheck.models.sources.architecture import named
from kbitcheck.models.vocabulary import Vocabulary, fewer
from kbitcheck.observe.cut import ProvenCut, proven_cut
from tests.deep import deep

FEW = Vocabulary(kept=16, total=64)


@pytest.fixture(autouse=True)
def _few_common_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "COMMON", 16)


def loaded(name: str) -> Any:
    return deep(named(name)).load(Quantization.parse("nf4"))


def batch(model: Any, largest: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(largest - 7, largest + 1).view(1, 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def proven(model: Any, largest: int) -> ProvenCut:
    with quiet():
        return proven_cut(model, batch(model, largest))


def test_a_cut_has_the_first_rows_of_embeddings_and_head() -> None:
    model = loaded("arch:llama")
    total = model.config.vocab_size
    made = proven(model, 14).cut
    assert str(made.vocabulary) == f"16 of {total:,} tokens"
    short = made.model
    assert short.config.vocab_size == short.model.embed_tokens.num_embeddings == short.lm_head.out_features == 16
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(short.get_parameter(name), model.get_parameter(name)[:16])
    assert (model.config.vocab_size, len(model.lm_head.weight)) == (total, total)  # the model itself is left alone


def test_tied_tables_stay_tied() -> None:
    model = loaded("arch:gemma3_text")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    short = proven(model, 14).cut.model
    assert short.lm_head.weight is short.model.embed_tokens.weight
    assert len(short.lm_head.weight) < len(model.lm_head.weight)


@pytest.mark.parametrize(("largest", "kept"), [(14, 16), (15, 16), (16, 32), (31, 32), (32, 64)])
def test_the_batch_says_how_many_tokens_are_needed(largest: int, kept: int) -> None:
    model = loaded("arch:llama")
    model.config.vocab_size = 128
    assert fewer(model, batch(model, largest)) == Vocabulary(kept=kept, total=128)


def test_more_than_half_of_the_tokens_is_not_worth_a_shorter_table() -> None:
    model = loaded("arch:llama")
    model.config.vocab_size = 128
    assert fewer(model, batch(model, 64)) is None


@pytest.mark.parametrize(("field", "kept"), [("pad_token_id", 64), ("image_token_id", 64), ("eos_token_id", 16)])
def test_a_token_that_the_configuration_looks_up_is_kept(field: str, kept: int) -> None:
    model = loaded("arch:llama")
    model.config.vocab_size = 128
    setattr(model.config, field, 40)
    assert fewer(model, batch(model, 14)) == Vocabulary(kept=kept, total=128)


def test_a_model_without_tokens_has_none_to_spare() -> None:
    assert fewer(nn.Linear(2, 2), {}) is None


def test_another_tensor_that_counts_the_tokens_keeps_them_all() -> None:
    model = loaded("arch:llama")
    model.register_buffer("counts", torch.zeros(model.config.vocab_size), persistent=False)
    made = proven(model, 14).cut
    assert made.vocabulary is None
    assert len(made.model.lm_head.weight) == len(model.lm_head.weight)


def test_a_head_that_preparation_treats_by_its_size_is_no_head_of_a_cut() -> None:
    """What a preparation does to a table is compared as if both had the cut's tokens."""

    def cast_large(model: Any) -> Any:
        if model.lm_head.out_features > 16:
            model.lm_head.to(torch.float16)
        return model

    model = loaded("arch:llama")
    proof = proven(model, 14)
    proof.require_alike(copy.deepcopy(model), copy.deepcopy(proof.cut.model))
    with pytest.raises(NoCut, match="preparation changes lm_head otherwise in a cut"):
        proof.require_alike(cast_large(copy.deepcopy(model)), cast_large(copy.deepcopy(proof.cut.model)))


def test_only_tables_of_the_whole_are_shortened() -> None:
    assert FEW.is_shorter(torch.zeros(64, 4), torch.zeros(16, 4))
    assert not FEW.is_shorter(torch.zeros(64, 4), torch.zeros(16, 5))
    assert not FEW.is_shorter(torch.zeros(4, 64), torch.zeros(4, 16))
    assert not FEW.is_shorter(torch.tensor(0.0), torch.tensor(0.0))
