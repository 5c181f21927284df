"""The adapters that are drawn for a case: their ranks, their alphas, their layers, and who keeps the case's own."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from kbitcheck.core.cases import CaseSpec
from kbitcheck.observe.drawn_adapters import RANKS, described, drawn_adapters
from kbitcheck.observe.probes.adapters import attach

SPEC = CaseSpec(model="tiny:gpt2", quant="nf4", implementation="reference", conditions="all")
MODEL = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=16))
MODEL.lead_in = nn.Linear(8, 8)  # outside the blocks
LAYERS = [f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]


def loaded(**own: Any) -> Any:
    training = SimpleNamespace(trains=())
    return SimpleNamespace(**{
        "pristine": MODEL, "targets": [*LAYERS, "lead_in"], "copies": True, "training": training, "large": False,
        "of_large": False, **own,
    })  # fmt: skip


@pytest.fixture(autouse=True)
def _linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbitcheck.observe.drawn_adapters.linear_layers", lambda model, layers: list(layers))


def test_every_rank_and_kind_of_layers_is_drawn() -> None:
    drawn = [drawn_adapters(loaded(), replace(SPEC, seed=seed)) for seed in range(80)]
    assert {spec.rank for spec in drawn} == {rank for ranks in RANKS for rank in ranks}
    assert {round(spec.scaling * spec.rank) / spec.rank for spec in drawn} >= {1, 2, 0.5}
    names = {frozenset(name.rpartition(".")[2] for name in spec.layers or ()) for spec in drawn}
    assert {frozenset(("c_attn", "c_proj", "c_fc", "lead_in")), frozenset(("c_attn", "c_proj", "lead_in"))} <= names
    assert frozenset(("c_fc", "lead_in")) in names
    assert all("lead_in" in each for each in names)
    assert drawn[3] == drawn_adapters(loaded(), replace(SPEC, seed=3))


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_a_suite_that_shares_its_conditions_has_every_range_of_ranks_and_every_kind_of_layers(seed: int) -> None:
    mine = [n for n in range(9) if (n + seed) % 3 == 0]  # the turns of KB310
    drawn = [drawn_adapters(loaded(), replace(SPEC, seed=seed, conditions=f"{n + 1}/9")) for n in mine]
    assert sorted(next(i for i, ranks in enumerate(RANKS) if spec.rank in ranks) for spec in drawn) == [0, 1, 2]
    on = [spec.layers or () for spec in drawn]
    assert sum(len(layers) == len(LAYERS) + 1 for layers in on) == 1
    assert any(
        {name for name in layers if ".h." in name} == set(LAYERS) - {n for n in LAYERS if "mlp" in n} for layers in on
    )


@pytest.mark.parametrize(
    ("own", "case"),
    [
        ({}, {"rank": 8}),
        ({}, {"targets": "c_attn"}),
        ({}, {"adapters": "peft:DoRA"}),
        ({"large": True}, {}),
        ({"of_large": True}, {}),
        ({"copies": False}, {}),
        ({"targets": []}, {}),
        ({"training": SimpleNamespace(trains=("score",))}, {}),
    ],
)
def test_who_names_or_makes_adapters_keeps_them(own: dict[str, Any], case: dict[str, Any]) -> None:
    spec = replace(SPEC, **case)
    assert drawn_adapters(loaded(**own), spec) is spec
    assert described(spec) == ""


def test_cases_of_one_base_share_what_later_uses_have() -> None:
    one = replace(SPEC, checkpointing="off", conditions="1/9")
    other = replace(SPEC, checkpointing="reentrant", conditions="2/9")
    assert drawn_adapters(loaded(), one, shared=True).attached == drawn_adapters(loaded(), other, shared=True).attached
    assert drawn_adapters(loaded(), one).attached != drawn_adapters(loaded(), other).attached


def test_the_words_are_of_the_adapters_that_are_attached() -> None:
    drawn = drawn_adapters(loaded(), replace(SPEC, seed=4))
    model = GPT2LMHeadModel(MODEL.config)
    on = [name for name in drawn.layers or () if name in LAYERS]
    _, adapters = attach(model, on, library="reference", rank=drawn.rank, seed=0, scaling=drawn.scaling)
    assert {name.partition(".lora_")[0] for name in adapters} == set(on)
    assert all(drawn.rank in p.shape for p in adapters.values())
    layer: Any = model.get_submodule(on[0])
    assert described(drawn).startswith(f", adapters of rank {drawn.rank} and alpha {layer.scaling * drawn.rank:g} on ")
