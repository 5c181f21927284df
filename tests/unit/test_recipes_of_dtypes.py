"""Recipes of dtypes: which profile the dtypes of a model follow, and what is no recipe."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import pytest
import torch
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"

from kbitcheck_reference import prepare_model_for_kbit_training as reference

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.anatomy import tower_of
from kbitcheck.core.cases import CaseSpec, Profile
from kbitcheck.core.facts.recipe import Recipe
from kbitcheck.core.recipe import groups, read
from kbitcheck.core.result import Party, Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.open_case import open_case
from kbitcheck.observe.probes.snapshot import snapshot
from kbitcheck.run import subject as implementations
from kbitcheck.run.subject import default_profile

Prepare = Callable[..., nn.Module]


def keeps(*parts: str, frozen: bool = True) -> Prepare:
    """A preparation after which parameters with any of these parts in their names are in half precision again."""

    def prepare(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
        half = {n: p.dtype for n, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)}
        trainable = [p for p in model.parameters() if p.requires_grad]
        reference(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        for name, parameter in model.named_parameters():
            if name in half and any(part in name for part in parts):
                parameter.data = parameter.data.to(half[name])
        for parameter in trainable:
            parameter.requires_grad_(not frozen)
        return model

    return prepare


ALL = ""
ENDS = ("embed_tokens", "lm_head")


def prepared(prepare: Prepare, model: str = "tiny:llama"):
    base = resolve(model).load(Quantization.parse("nf4"))
    return base, snapshot(base), snapshot(prepare(base))


@pytest.mark.parametrize(
    ("prepare", "profile", "text"),
    [
        (keeps(), "peft", "dtypes as PEFT prepares them: everything upcast"),
        (keeps(*ENDS), "qlora", "dtypes: norms upcast, autocast"),
        (keeps(ALL), "frozen-half", "dtypes: nothing upcast"),
    ],
)
def test_a_recipe_is_read_off_the_dtypes(prepare: Prepare, profile: str, text: str) -> None:
    _, loaded, facts = prepared(prepare)
    for before in (loaded, None):
        recipe = read(facts, before)
        assert (recipe.profile, recipe.freezes, recipe.mixed) == (profile, "at-prepare", False)
        assert str(recipe) == text


def test_who_leaves_freezing_to_the_adapters_freezes_at_attach() -> None:
    assert read(prepared(keeps(ALL, frozen=False))[2]).freezes == "at-attach"


def test_trainers_are_named_by_what_they_do() -> None:
    trl = Recipe(profile="frozen-half", freezes="at-attach", adapters="bfloat16", autocast=True)
    assert str(trl) == "dtypes as TRL prepares them: nothing upcast, adapters bf16, autocast"
    assert dataclasses.replace(trl, profile="peft").trainer == "TRL"  # `trl sft` loads in float32
    assert str(dataclasses.replace(trl, adapters="float16")) == "dtypes: nothing upcast, adapters fp16, autocast"
    assert str(dataclasses.replace(trl, mixed=True)).startswith("dtypes of no single recipe: closest to frozen-half")


def test_a_norm_that_differs_from_its_tower_is_a_mixture() -> None:
    _, loaded, facts = prepared(keeps(*ENDS, "layers.0.input_layernorm"))
    recipe = read(facts, loaded)
    assert (recipe.profile, recipe.mixed) == ("qlora", True)
    mixed = [group for group in groups(facts, facts, loaded) if group.mixed]
    assert [group.name for group in mixed] == ["norms of model.layers"]
    assert [name for name, dtype in mixed[0].dtypes.items() if dtype != "float32"] == [
        "model.layers.0.input_layernorm.weight"
    ]


def test_towers_may_differ() -> None:
    _, loaded, facts = prepared(keeps("vision"), "tiny:llava")
    recipe = read(facts, loaded)
    assert (recipe.mixed, recipe.towers_differ) == (False, True)
    assert "norms upcast in some towers" in str(recipe)


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("model.norm.weight", "model.layers"),
        ("model.vision.layers.1.norm.weight", "model.vision.layers"),
        ("model.vision.post_norm.weight", "model.vision.layers"),
        ("other.norm.weight", "model.layers"),
    ],
)
def test_a_parameter_belongs_to_the_nearest_tower(name: str, tower: str) -> None:
    assert tower_of(name, ("model.layers", "model.vision.layers")) == tower
    assert tower_of(name, ()) == ""


def case(prepare: Prepare, profile: Profile = "auto") -> Case:
    spec = CaseSpec(model="tiny:llama", quant="nf4", implementation="x", profile=profile)
    opened = open_case(spec, implementations.describe(prepare))
    assert isinstance(opened, Case)
    return opened


@pytest.mark.parametrize(("prepare", "profile"), [(keeps(*ENDS), "qlora"), (keeps(ALL, frozen=False), "frozen-half")])
def test_auto_judges_a_recipe_by_its_own_profile(prepare: Prepare, profile: str) -> None:
    opened = case(prepare)
    assert opened.profile == profile
    for code in ("KB101", "KB201", "KB202", "KB209", "KB215", "KB302", "KB304", "KB603"):
        assert judge(rules()[code], opened).status in (Status.PASS, Status.SKIP), code
    assert opened.summary()["recipe"] == str(opened.recipe)


def test_a_requested_profile_is_not_read_off() -> None:
    opened = case(keeps(ALL), "peft")
    assert opened.recipe is None
    assert judge(rules()["KB201"], opened).status is Status.FAIL


def test_a_mixture_is_one_fault_under_auto() -> None:
    opened = case(keeps("layers.1.post_attention_layernorm"))
    (failure,) = judge(rules()["KB215"], opened).failures
    assert (failure.where, failure.actual) == ("model.layers.1.post_attention_layernorm.weight", "bfloat16")
    assert failure.party is Party.IMPLEMENTATION
    for code in ("KB201", "KB202"):
        result = judge(rules()[code], opened)
        assert (result.status, "KB215" in result.reason) == (Status.SKIP, True)


def test_a_mixture_that_was_loaded_is_reported_and_no_fault() -> None:
    def widen(model: nn.Module) -> None:
        model.get_submodule("model.layers.0.input_layernorm").float()

    spec = CaseSpec(model="tiny:llama", quant="nf4", implementation="x", profile="frozen-half")
    loaded = Loaded.from_source(resolve(spec.model), spec, spoil=widen)
    result = judge(rules()["KB215"], Case(spec, keeps(ALL), loaded))
    assert result.status is Status.PASS
    assert result.notes == ("norms of model.layers: loaded as a mixture of bfloat16 and float32",)


def test_what_a_class_keeps_in_float32_is_no_mixture() -> None:
    model, _, _ = prepared(keeps(ALL))
    model.get_submodule("model.layers.0.input_layernorm").float()
    assert read(snapshot(model)).mixed
    model._keep_in_fp32_modules = ["input_layernorm"]
    assert not read(snapshot(model)).mixed


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("peft", "peft"), ("reference", "peft"), ("peft==0.13.2", "peft"), ("trl==1.0", "auto"), ("mine:prepare", "auto"),
        ("peft==0.13.2::mine:prepare", "auto"),
    ],
)  # fmt: skip
def test_model_reads_the_recipe_of_other_preparations(name: str, profile: str) -> None:
    assert default_profile(name) == profile
