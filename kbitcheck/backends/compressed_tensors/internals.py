"""The private names of compressed-tensors that this backend needs, each there in 0.20.1."""

from collections.abc import Mapping
from typing import Any

from compressed_tensors.compressors.base import decompress_module
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from torch import Tensor, nn
from transformers.quantizers import auto

from kbitcheck.backends.internals import mark as mark_quantized

PACKED, UNPACKED = QuantizationStatus.COMPRESSED, QuantizationStatus.DECOMPRESSED


def mark(model: nn.Module, described: Mapping[str, Any]) -> list[nn.Module]:
    """Leave on a model what loading a checkpoint with this ``quantization_config`` leaves; its layers that are to hold packed weights."""
    mark_quantized(
        model, auto.AutoQuantizationConfig.from_dict(dict(described)), pre_quantized=True
    ).validate_environment()  # says, too, whether it trains
    apply_quantization_config(model, QuantizationConfig.model_validate(dict(described)), show_progress=False)
    return [module for module in model.modules() if getattr(module, "quantization_scheme", None) is not None]


def fill(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's tensors into a layer, in the place of its weight."""
    del layer.weight
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    vars(layer)["quantization_status"] = PACKED


def unpack(layer: nn.Module) -> None:
    """What a model's first forward does with each layer."""
    decompress_module(layer)
