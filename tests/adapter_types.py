"""Tiny quantized models with adapters of each of PEFT's types, prepared by PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch

import kbitcheck
from kbitcheck.backends import registry
from kbitcheck.core.adapters import NAMED
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.report import Report
from kbitcheck.models.load import quiet
from kbitcheck.observe.configured import configuration
from kbitcheck.observe.loaded import Loaded
from tests.shallow import shallow

peft = pytest.importorskip("peft")

SCHEMES = ("nf4", "int8", "torchao-int8")
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL: Mapping[str, Mapping[str, Any]] = {
    **NAMED,
    "LoRA, biases trained": {"peft_type": "LORA", "bias": "all"},
    "LoRA, dropout": {"peft_type": "LORA", "lora_dropout": 0.1},
    "LoRA, a head trained": {"peft_type": "LORA", "modules_to_save": ["lm_head"]},
    "LoRA, tokens trained": {"peft_type": "LORA", "trainable_token_indices": [1, 2, 5]},
    "LoRA, experts": {"peft_type": "LORA", "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "LayerNorm": {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm", "norm"]},
}


@cache
def needs(scheme: str) -> None:
    """Skip, with the backend's own reason, where no model can be quantized by the scheme here."""
    backend = registry.of_scheme(scheme)
    if why := backend.unavailable() or backend.not_on_load():
        pytest.skip(why)


def loaded(scheme: str, recipe: str = "tiny:llama") -> Loaded:
    """A shallow model, quantized."""
    return Loaded.from_source(shallow(recipe), CaseSpec(model=recipe, quant=scheme, implementation="peft"))


def recipe_of(name: str) -> str:
    """The model that an entry of ``ALL`` is put on."""
    return "tiny:mixtral" if "target_parameters" in ALL[name] else "tiny:llama"


def prepared(name: str, scheme: str) -> Any:
    """A fresh model with the adapters of an entry of ``ALL``, as PEFT starts them; PEFT's exception where it refuses."""
    torch.manual_seed(0)
    model = loaded(scheme, recipe_of(name)).copy()
    checkpointed = "PREFIX" not in ALL[name]["peft_type"]
    kwargs = {"use_reentrant": False}
    with quiet():
        model = peft.prepare_model_for_kbit_training(model, checkpointed, kwargs)
        return peft.get_peft_model(model, configuration(ALL[name], LAYERS, 4))


def batch(number: int) -> dict[str, torch.Tensor]:
    """Two rows without padding."""
    ids = torch.randint(1, 256, (2, 16), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def watched(model: Any, steps: int) -> Report:
    """The report of ``watch`` on a training loop of so many steps."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with kbitcheck.watch(model, optimizer, steps=steps) as run:
        for number in range(steps):
            model(**batch(number)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return run.report


def refusal(model: Any) -> str:
    """What a forward and backward in train mode raise; "" where they run."""
    model.train()
    try:
        with quiet():
            model(**batch(0)).loss.backward()
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return str(error).partition("\n")[0]
    finally:
        model.zero_grad()
    return ""
