"""Stacks of experts in 4 bits by parametrization: loaded, sized, unpacked, prepared, trained and judged like quantized layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kbitcheck_reference import dequantized_weight, lora, prepare_model_for_kbit_training
from kbitcheck_reference.formats.bitsandbytes import TABLES
from torch import nn

import kbitcheck
from kbitcheck import backends
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.parametrized import deep_copy
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe import loaded
from kbitcheck.observe.in_place import left_as_it_was
from kbitcheck.observe.probes import adapters
from kbitcheck.observe.probes.layers import Weights
from kbitcheck.observe.probes.snapshot import snapshot
from kbitcheck.observe.twin import twins
from kbitcheck.sabotage.experts import stacks
from tests.shallow import shallow

STACKED = "nf4,experts=parametrize"
SCHEMES = (STACKED, "fp4,double,experts=parametrize")
# gpt-oss stacks its experts in every supported transformers; others do from transformers 5 on.
MODEL = "tiny:gpt-oss"


@pytest.fixture(autouse=True)
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "source_of", lambda spec: shallow(spec.model))


def load(quant: str = STACKED, model: str = MODEL) -> Any:
    return shallow(model).load(Quantization.parse(quant))


def tensors(model: Any) -> dict[str, tuple[int, torch.dtype, torch.Size]]:
    held: dict[str, torch.Tensor] = {
        f"{n}:{k}": v
        for n, m in backends.holders(model)
        for k, v in backends.recognition(m).state(m).items()
        if isinstance(v, torch.Tensor)
    }
    return {n: (t.nbytes, t.dtype, t.shape) for n, t in {**dict(model.named_parameters()), **held}.items()}


@pytest.mark.parametrize("quant", SCHEMES)
def test_sizes_without_weights_are_those_of_the_loaded_model(quant: str) -> None:
    empty = shallow(MODEL).meta(Quantization.parse(quant))
    assert tensors(empty) == tensors(load(quant))
    assert all(p.is_meta for p in empty.parameters())
    assert len(stacks(empty)) == 4


@pytest.mark.parametrize("quant", SCHEMES)
def test_every_stack_unpacks_as_the_oracle_says(quant: str) -> None:
    for holder in stacks(load(quant)):
        assert torch.equal(backends.arithmetic(holder).exact(holder), dequantized_weight(holder))


def test_every_number_is_the_nearest_code_of_its_block() -> None:
    model, plain = load(), load("nf4")
    half_gap = TABLES["nf4"].sort().values.diff().max() / 2
    for name, holder in backends.holders(model):
        if backends.recognition(holder).multiplies(holder):
            continue
        own = plain.get_parameter(name.replace("parametrizations.", "")).detach().double()
        apart = (backends.arithmetic(holder).exact(holder) - own).abs().flatten()
        assert own.numel() % 64 == 0
        largest = own.abs().view(-1, 64).amax(1).repeat_interleave(64)
        assert bool((apart <= half_gap * largest * (1 + 2**-20)).all())  # the kernel compares in float32


def test_a_model_without_stacked_experts_is_refused() -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM has no stacked experts"):
        load(model="tiny:llama")


def test_experts_may_be_skipped() -> None:
    model = load(f"{STACKED},skip=model.layers.0.mlp.experts")
    assert {n.split(".")[2] for n, m in backends.holders(model) if ".experts." in n} == {"1"}


@pytest.mark.parametrize(
    "model", [MODEL, pytest.param("tiny:qwen3-moe", marks=pytest.mark.transformers5("stacks them"))]
)
def test_the_reference_conforms(model: str) -> None:
    codes = ["KB101", "KB102", "KB104", "KB2", "KB302", "KB304", "KB305", "KB504", "KB506", "KB603"]
    report = kbitcheck.check_implementation(
        prepare_model_for_kbit_training,
        models=[model],
        quants=[STACKED],
        checkpointing=["non-reentrant"],
        strict=True,
        select=codes,
    )
    assert {r.rule: r.reason or r.failures[0] for r in report.results if r.status.value in ("FAIL", "ERROR")} == {}


def test_stacks_get_adapters_beside_linear_layers() -> None:
    model = load()
    targets = adapters.target_layers(model, "all-linear")
    assert {n.rpartition(".")[2] for n in targets} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    }
    assert adapters.target_layers(model, "q_proj") == [n for n in targets if n.endswith("q_proj")]
    made = adapters.attach(model, targets, library="reference", rank=3, seed=0).adapters
    assert made["model.layers.0.mlp.experts.parametrizations.down_proj.lora_A.weight"].shape == (4, 3, 100)


def test_prepared_experts_are_read_in_float32_and_nothing_packed_changes() -> None:
    model = load()
    before = snapshot(model)
    prepare_model_for_kbit_training(model)
    after = snapshot(model)
    names = [n for n, layer in before.layers.items() if not layer.multiplies]
    assert names
    for name in names:
        assert (before.layers[name].compute, after.layers[name].compute) == ("bfloat16", "float32")
        assert before.layers[name].state == after.layers[name].state
        assert before.layers[name].dequantized == after.layers[name].dequantized
    assert model.model.layers[0].mlp.experts.down_proj.dtype is torch.float32


def test_one_call_in_place_is_undone() -> None:
    model = load()
    with left_as_it_was(model):
        prepare_model_for_kbit_training(model)
    assert model.model.layers[0].mlp.experts.down_proj.dtype is torch.bfloat16


def test_the_float64_twin_reads_what_the_format_says() -> None:
    model = load()
    weights = Weights(model)
    twin: Any = twins.float64(model, weights)
    experts = twin.model.layers[1].mlp.experts
    stack = model.model.layers[1].mlp.experts.parametrizations["down_proj"]
    assert torch.equal(experts.down_proj, dequantized_weight(stack))
    assert model.model.layers[1].mlp.experts.down_proj.dtype is torch.bfloat16


def test_adapters_on_a_stack_move_what_its_owner_reads_by_expert() -> None:
    model = load()
    experts = model.model.layers[0].mlp.experts
    before = experts.down_proj.clone()
    lora.attach(model, rank=2, alpha=4.0, targets=["parametrizations.down_proj"])
    assert torch.equal(experts.down_proj, before)
    pair = experts.parametrizations["down_proj"]
    with torch.no_grad():
        pair.lora_B.weight[1].fill_(0.25)
    moved = experts.down_proj
    expected = 2.0 * pair.lora_B.weight[1] @ pair.lora_A.weight[1]
    assert torch.equal(moved[1], before[1] + expected.to(before.dtype))
    assert torch.equal(moved[0], before[0])
    lora.detach(model)
    assert torch.equal(experts.down_proj, before)
    with pytest.raises(ValueError, match="no input of their own"):
        lora.attach(model, dropout=0.5, targets=["parametrizations.down_proj"])


def test_what_is_removed_of_a_copy_stays_in_the_model() -> None:
    model = load()
    copied = deep_copy(model)
    experts = copied.model.layers[0].mlp.experts
    nn.utils.parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=False)
    assert model.model.layers[0].mlp.experts.down_proj.dtype is torch.bfloat16
    assert torch.equal(copied.model.layers[1].mlp.experts.down_proj, model.model.layers[1].mlp.experts.down_proj)


@pytest.mark.transformers5("stacks the experts")
def test_a_mixtrals_experts_take_what_four_bits_and_their_scales_take() -> None:
    source = resolve("fixtures/configs/mixtral-8x7b.json", static="always")
    (left,), (packed,) = (
        [sum(t.nbytes for n, t in snapshot(source.meta(Quantization.parse(q))).parameters.items() if ".experts." in n)]
        for q in ("nf4", STACKED)
    )
    numbers = 32 * 8 * 3 * 4096 * 14336
    assert (left, packed) == (2 * numbers, numbers // 2)
