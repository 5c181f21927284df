"""The minimal LoRA: what it wraps, computes, draws, saves and gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from kbitcheck_reference import LoraLinear, dequantized_weight, is_quantized, lora
from kbitcheck_reference.adapters import MARKER
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.unit.reference.drawing import draw_up

if TYPE_CHECKING:
    from pathlib import Path


class Float(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.conv = Conv1D(4, 5)  # transformers'
        self.score = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.score(self.conv(self.fc(x)))
        return result


def test_a_wrapped_layer_tells_its_sizes() -> None:
    model: Any = lora.attach(Float(), targets=["fc", "conv"])
    assert (model.fc.in_features, model.fc.out_features) == (6, 5)
    assert (model.conv.in_features, model.conv.out_features) == (5, 4)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_wraps_every_quantized_layer_and_freezes_the_rest(load: Any, quantization: str) -> None:
    model = load("llama", quantization)
    quantized = {name for name, module in model.named_modules() if is_quantized(module)}
    assert len(quantized) == 14
    assert lora.attach(model) is model
    assert set(lora.layers(model)) == quantized
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(lora.parameters(model))
    assert all(getattr(layer, MARKER) is True for layer in lora.layers(model).values())


def test_leaves_float_layers_alone_where_some_are_quantized(load: Any) -> None:
    model = nn.ModuleDict({"text": load("llama"), "extra": nn.Linear(4, 4)})
    names = set(lora.layers(lora.attach(model)))
    assert "extra" not in names
    assert "text.model.layers.0.mlp.up_proj" in names


def test_wraps_float_layers_where_none_is_quantized_but_not_the_head() -> None:
    assert set(lora.layers(lora.attach(Float()))) == {"fc", "conv"}


def test_leaves_the_output_embeddings_alone(load: Any) -> None:
    model = load("whisper", None)
    assert model.get_output_embeddings() is model.proj_out
    names = set(lora.layers(lora.attach(model)))
    assert "proj_out" not in names
    assert "model.encoder.layers.0.fc1" in names


def test_targets_name_the_last_components(load: Any) -> None:
    model = lora.attach(load("llama"), targets=["q_proj", "layers.1.mlp.up_proj", "lm_head"])
    assert set(lora.layers(model)) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "lm_head",
    }


def test_refuses_what_it_cannot_do() -> None:
    model = Float()
    with pytest.raises(ValueError, match="no linear layer named 'c'"):
        lora.attach(model, targets=["fc", "c"])
    assert lora.layers(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="no linear layer to put adapters on"):
        lora.attach(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="already"):
        lora.attach(lora.attach(model))


def test_computes_base_plus_scaled_update() -> None:
    model = lora.attach(Float(), rank=2, alpha=6.0)
    x = torch.randn(3, 6)
    layer = lora.layers(model)["fc"]
    assert torch.equal(layer(x), layer.base_layer(x))
    draw_up(model, seed=0, scale=1.0)
    for name, size in (("fc", 6), ("conv", 5)):
        layer = lora.layers(model)[name]
        x = torch.randn(3, size)
        update = x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 3.0 * update)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_gradients_are_those_of_the_formula(load: Any, quantization: str) -> None:
    layer = lora.attach(load("llama", quantization, torch.float32)).train().model.layers[0].mlp.down_proj
    draw_up(nn.ModuleDict({"layer": layer}), seed=0)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    layer(x).sum().backward()
    weight, down, up = (
        tensor.detach().double()
        for tensor in (dequantized_weight(layer.base_layer), layer.lora_A.weight, layer.lora_B.weight)
    )
    ones = torch.ones(5, 64, dtype=torch.float64)
    torch.testing.assert_close(x.grad, (ones @ (weight + 2.0 * up @ down)).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        layer.lora_A.weight.grad, (2.0 * (ones @ up).T @ x.detach().double()).float(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_keeps_the_base_outputs_dtype(
    load: Any, quantization: str, autocast: bool, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    layer = load("llama", quantization).train().model.layers[0].mlp.up_proj
    x = torch.randn(2, 64).to(x_dtype).requires_grad_(True)
    holder = lora.attach(nn.ModuleDict({"layer": layer}), dtype=dtype)
    draw_up(holder, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert holder["layer"](x).dtype == layer(x).dtype
    holder["layer"](x).sum().backward()
    assert {parameter.grad.dtype for parameter in holder.parameters() if parameter.grad is not None} == {dtype}


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone() -> None:
    model = lora.attach(Float(), dropout=0.5)
    draw_up(model, seed=0, scale=1.0)
    layer = lora.layers(model)["fc"]
    x = torch.randn(64, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    layer.lora_B.weight.data.zero_()
    assert torch.equal(layer(x), layer.base_layer(x))


def test_keeps_each_layers_mode() -> None:
    model = Float()
    model.fc.eval()
    lora.attach(model)
    assert [lora.layers(model)[name].training for name in ("fc", "conv")] == [False, True]
    assert [lora.layers(model)[name].dropout.training for name in ("fc", "conv")] == [False, True]


def test_draws_depend_on_seed_and_name_alone() -> None:
    def drawn(seed: int, **options: Any) -> dict[str, torch.Tensor]:
        model = lora.attach(Float(), seed=seed, **options)
        draw_up(model, seed=seed)
        return {name: parameter.detach() for name, parameter in lora.parameters(model).items()}

    state = torch.get_rng_state()
    torch.manual_seed(1)
    first = drawn(0)
    torch.manual_seed(2)
    second, other, alone, wide = drawn(0), drawn(1), drawn(0, targets=["conv"]), drawn(0, dtype=torch.float64)
    torch.set_rng_state(state)

    assert set(first) == {f"{name}.lora_{half}.weight" for name in ("fc", "conv") for half in "AB"}
    for name in first:
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], other[name])
        assert bool((first[name] != 0).all())
        assert torch.equal(first[name].double(), wide[name])
    assert all(torch.equal(alone[name], first[name]) for name in alone)
    assert first["fc.lora_A.weight"].abs().max() <= 6**-0.5
    uniform = first["fc.lora_A.weight"].flatten() * 6**0.5, first["conv.lora_A.weight"].flatten() * 5**0.5
    assert not torch.allclose(uniform[0][:20], uniform[1])


def test_up_starts_at_zero_and_scale_scales() -> None:
    model = lora.attach(Float())
    assert all(layer.lora_B.weight.abs().max() == 0 for layer in lora.layers(model).values())
    draw_up(model, seed=0, scale=1.0)
    large = lora.layers(model)["fc"].lora_B.weight.detach().clone()
    draw_up(model, seed=0, scale=0.5)
    torch.testing.assert_close(lora.layers(model)["fc"].lora_B.weight.detach(), large / 2)


def test_global_random_state_is_not_touched() -> None:
    model = Float()
    before = torch.get_rng_state()
    draw_up(lora.attach(model), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_saves_and_loads(tmp_path: Path) -> None:
    first, second = lora.attach(Float(), seed=1), lora.attach(Float(), seed=2)
    draw_up(first, seed=1)
    lora.save(first, tmp_path / "a.safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == set(lora.parameters(first))
    lora.load(second, tmp_path / "a.safetensors")
    for name, parameter in lora.parameters(second).items():
        assert torch.equal(parameter, lora.parameters(first)[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, r"fc\.lora_A\.weight is \(4, 6\) in the file and \(2, 6\) in the model"),
        ({"targets": ["fc"]}, r"unexpected conv\.lora_A\.weight"),
        ({"targets": ["fc", "conv", "score"]}, r"missing score\.lora_B\.weight"),
        ({"alpha": 4.0}, r"scaling is 2\.0 in the file and 1\.0 in the model"),
    ],
)
def test_refuses_a_file_that_does_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    lora.save(lora.attach(Float()), tmp_path / "a.safetensors")
    model = lora.attach(Float(), seed=5, **options)
    before = {name: parameter.detach().clone() for name, parameter in lora.parameters(model).items()}
    with pytest.raises(ValueError, match=message):
        lora.load(model, tmp_path / "a.safetensors")
    assert all(torch.equal(parameter, before[name]) for name, parameter in lora.parameters(model).items())


def test_refuses_models_without_adapters_and_files_of_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="carries no adapters"):
        lora.save(Float(), tmp_path / "a.safetensors")
    model = lora.attach(Float())
    save_file({name: p.detach() for name, p in lora.parameters(model).items()}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="scaling is None"):
        lora.load(model, tmp_path / "b.safetensors")


@pytest.mark.parametrize("quantization", ["nf4-double", "int8"])
def test_base_keeps_its_names_on_disk(load: Any, batch: Any, tmp_path: Path, quantization: str) -> None:
    model = load("llama", quantization).eval()
    keys = set(model.state_dict())
    expected = {name: module for name, module in model.named_modules() if is_quantized(module)}
    weights = {name: dequantized_weight(module) for name, module in expected.items()}
    lora.attach(model)
    assert set(model.state_dict()) == keys | set(lora.parameters(model))

    model.save_pretrained(tmp_path)

    again = type(model).from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    for name, weight in weights.items():
        assert torch.equal(dequantized_weight(again.get_submodule(name)), weight)


def test_loads_the_state_of_a_wrapped_and_of_a_plain_model() -> None:
    source = Float()
    wrapped: Any = lora.attach(Float(), seed=3)
    result = wrapped.load_state_dict(source.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) == set(lora.parameters(wrapped))
    assert torch.equal(wrapped.fc.weight, source.fc.weight)
    other: Any = lora.attach(Float(), seed=4)
    assert not other.load_state_dict(wrapped.state_dict()).missing_keys
    assert torch.equal(other.fc.lora_A.weight, wrapped.fc.lora_A.weight)
    assert torch.equal(other.fc.bias, source.fc.bias)


def test_detach_puts_the_very_layers_back() -> None:
    model: Any = Float()
    model.alias = model.fc
    fc, conv = model.fc, model.conv
    fc.register_forward_hook(lambda module, args, output: output * 2)
    hooks = dict(fc._forward_hooks)
    x = torch.randn(2, 6)
    before = model(x)
    lora.attach(model)
    assert isinstance(model.fc, LoraLinear)
    assert model.alias is model.fc
    draw_up(model, seed=0, scale=1.0)
    assert not torch.equal(model(x), before)
    assert lora.detach(model) is model
    assert model.fc is fc is model.alias
    assert model.conv is conv
    assert dict(fc._forward_hooks) == hooks
    assert list(model.state_dict()) == [*Float().state_dict(), "alias.weight", "alias.bias"]
    assert torch.equal(model(x), before)


def test_forwards_what_models_look_at() -> None:
    layer = lora.layers(lora.attach(Float()))["fc"]
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
