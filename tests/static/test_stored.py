"""KB911: packed weights of a checkpoint beside the model that they are loaded into, with numbers and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.result import Party, Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.models.sources.resolve import resolve, source_of
from kbitcheck.models.stored import stored, stored_without_numbers, tensors
from kbitcheck.observe.static import StaticCase
from tests.shallow import shallow

pytestmark = pytest.mark.transformers5("before it, no parameter is made of several tensors of a checkpoint")


def saved(folder: Path, model: str, quant: str) -> Any:
    """A checkpoint of packed weights; returns its source."""
    shallow(model).load(Quantization.parse(quant)).save_pretrained(folder)
    return resolve(str(folder))


def loaded(source: Any) -> Any:
    return source.load(Quantization.parse(source.quant))


@pytest.mark.parametrize(
    ("model", "quant", "layers"),
    [
        ("tiny:llama", "nf4,double", 14),
        ("tiny:gpt2", "int8", 8),
        ("tiny:llava", "fp4", 0),
        ("tiny:opt", "nf4,storage=bf16", 0),
    ],
)
def test_each_packed_weight_of_a_good_checkpoint_is_in_its_place(
    tmp_path: Path, model: str, quant: str, layers: int
) -> None:
    source = saved(tmp_path, model, quant)
    seen = stored(loaded(source))
    assert seen.states >= max(layers, 8)
    assert (seen.lost, seen.differing) == ({}, {})
    assert stored_without_numbers(source.meta(Quantization.parse(source.quant)), tmp_path) == seen


@pytest.mark.parametrize("part", ["weight", "weight.absmax", "weight.quant_map"])
def test_a_tensor_that_is_not_the_files_is_named(tmp_path: Path, part: str) -> None:
    source = saved(tmp_path, "tiny:llama", "nf4")
    model = loaded(source)
    name = "model.layers.1.self_attn.q_proj"
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    flat = held[f"{name}.{part}"].view(torch.uint8)
    flat.view(-1)[0] += 1
    save_file(held, file, {"format": "pt"})
    assert stored(model).differing == {f"{name}.weight": part}


def experts_one_by_one(folder: Path) -> Path:
    """A mixture of experts as transformers 4 saved it in 4 bits: each expert has linear layers of its own."""
    import bitsandbytes.functional as bnb
    from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2, architectures=["MixtralForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).bfloat16()
    numbers: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner = name.rpartition(".mlp.")[0] + ".block_sparse_moe"
        if name.endswith("gate_up_proj"):
            for expert, both in enumerate(tensor):
                for part, half in zip(("w1", "w3"), both.chunk(2), strict=True):
                    numbers[f"{owner}.experts.{expert}.{part}.weight"] = half
        elif name.endswith("down_proj"):
            numbers |= {f"{owner}.experts.{e}.w2.weight": each for e, each in enumerate(tensor)}
        else:
            numbers[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor
    held: dict[str, torch.Tensor] = {}
    for name, tensor in numbers.items():
        held[name] = tensor.clone()
        if "_proj" in name or ".experts." in name:
            held[name], state = bnb.quantize_4bit(tensor.contiguous(), quant_type="nf4", compress_statistics=False)
            held |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    folder.mkdir()
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    fields = {**config.to_dict(), "quantization_config": own.to_dict()}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


JOINED = {
    f"model.layers.0.mlp.experts.{part}": "no quantized layer; packed bytes of several tensors are joined there"
    for part in ("gate_up_proj", "down_proj")
}


def test_packed_experts_that_loading_joins_are_named_with_and_without_a_run(tmp_path: Path) -> None:
    folder = experts_one_by_one(tmp_path / "experts")
    spec = CaseSpec(model=str(folder), quant="nf4", implementation="peft", static="always")
    result = judge(rules()["KB911"], StaticCase(spec, source_of(spec, static="always")))
    assert (result.status, result.attributed_to) == (Status.FAIL, Party.STACK)
    assert {f.where: f.actual for f in result.failures} == JOINED
    model: nn.Module = loaded(resolve(str(folder)))
    assert stored(model).lost == JOINED  # type: ignore[arg-type]
    assert not stored(model).differing  # type: ignore[arg-type]


def test_the_index_of_a_checkpoint_is_enough(tmp_path: Path) -> None:
    """As of a model on the hub whose shards are not fetched for a static audit."""
    folder = experts_one_by_one(tmp_path / "experts")
    file = folder / "model.safetensors"
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors(folder), "shard")})
    )
    file.unlink()
    spec = CaseSpec(model=str(folder), quant="nf4", implementation="peft", static="always")
    result = judge(rules()["KB911"], StaticCase(spec, source_of(spec, static="always")))
    assert {f.where: f.actual for f in result.failures} == JOINED


def test_a_model_that_is_quantized_on_load_has_nothing_to_look_at(tmp_path: Path) -> None:
    source = resolve("tiny:llama")
    with pytest.raises(Unavailable, match="quantized on load"):
        stored(shallow("tiny:llama").load(Quantization.parse("nf4")))
    with pytest.raises(Unavailable, match="no tensor of the checkpoint"):
        stored_without_numbers(source.meta(Quantization.parse("nf4")), tmp_path)
