"""Quantized layers are told by type and state."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from kbitcheck_reference import is_quantized, is_quantized_parameter, prepare_model_for_kbit_training, quantized_layers
from kbitcheck_reference.upcast import castable_parameters
from torch import nn

bnb: Any = bitsandbytes  # its types are incomplete


def four_bit(**options: Any) -> Any:
    return bnb.nn.Linear4bit(64, 32, **options).to("cpu")


def test_bitsandbytes_layers() -> None:
    assert is_quantized(four_bit())
    assert is_quantized(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu"))
    assert not is_quantized(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True).to("cpu"))
    assert not is_quantized(nn.Linear(4, 4))


def test_state_kept_on_the_layer_counts() -> None:
    layer = four_bit(quant_storage=torch.bfloat16)
    layer.quant_state, layer.weight.quant_state = layer.weight.quant_state, None
    assert is_quantized(layer)
    assert is_quantized_parameter(layer.weight)


def test_packed_parameters_and_their_subclasses_are_never_cast() -> None:
    model: Any = nn.ModuleList([four_bit(quant_storage=torch.bfloat16), nn.LayerNorm(4).bfloat16()])
    model[0].weight.__class__ = type("Fork", (bnb.nn.Params4bit,), {})
    model[0].weight.quant_state = None
    assert castable_parameters(model) == list(model[1].parameters())


@pytest.mark.parametrize("attribute", ["quant_state", "SCB", "CB"])
def test_a_parameter_with_state_of_an_unknown_class_is_packed(attribute: str) -> None:
    parameter = nn.Parameter(torch.zeros(4).half())
    assert not is_quantized_parameter(parameter)
    setattr(parameter, attribute, torch.ones(1))
    assert is_quantized_parameter(parameter)


FOREIGN = [
    ("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear"),
    ("my_fork", "MarlinQuantLinear"),
    ("awq.modules.linear.gemm", "WQLinear_GEMM"),
    ("hqq.core.quantize", "HQQLinear"),
    ("transformers.integrations.eetq", "EetqLinear"),
    ("aqlm.inference", "QuantizedLinear"),
    ("optimum.quanto.nn.qlinear", "QLinear"),
    ("transformers.integrations.finegrained_fp8", "FP8Linear"),
    ("transformers.integrations.mxfp4", "Mxfp4GptOssExperts"),
    ("transformers.integrations.higgs", "AnyNameAtAll"),
]


@pytest.mark.parametrize(("package", "name"), FOREIGN)
def test_layers_of_other_backends_keep_their_scales(package: str, name: str) -> None:
    cls = type(name, (nn.Module,), {"__module__": package})
    layer = cls()
    layer.scales = nn.Parameter(torch.ones(4).half())
    model = nn.ModuleDict({"packed": layer, "norm": nn.LayerNorm(4).half()})
    assert [found for found, _ in quantized_layers(model)] == ["packed"]

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    assert layer.scales.dtype == torch.float16
    assert not layer.scales.requires_grad
    assert model["norm"].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("package", "name"),
    [("peft.tuners.lora.gptq", "QuantLinear"), ("transformers.integrations.peft", "Adapter"), ("mine", "Linear")],
)
def test_layers_that_only_look_like_it_are_not_quantized(package: str, name: str) -> None:
    assert not is_quantized(type(name, (nn.Module,), {"__module__": package})())


def test_tensor_subclasses_are_packed_but_distributed_ones_are_not() -> None:
    def of(module: str) -> torch.Tensor:
        namespace = {"__tensor_flatten__": lambda self: ([], None), "__module__": module}
        return torch.zeros(2, 2).half().as_subclass(type("Wrapped", (torch.Tensor,), namespace))

    assert is_quantized_parameter(of("torchao.dtypes"))
    assert not is_quantized_parameter(of("torch.distributed.tensor"))
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = nn.Parameter(of("torchao.dtypes"))
    assert is_quantized(layer)
