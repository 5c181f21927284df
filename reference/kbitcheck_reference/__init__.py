"""The oracle: a preparation, a minimal LoRA and float64 dequantization (``formats``), written from the specification.

Imports torch and nothing of kbitcheck.
"""

from . import formats, lora
from .formats import dequantized_weight
from .lora_layer import LoraLinear
from .prepare import prepare_model_for_kbit_training
from .quantized import is_quantized, is_quantized_parameter, quantized_layers

__all__ = [
    "LoraLinear",
    "dequantized_weight",
    "formats",
    "is_quantized",
    "is_quantized_parameter",
    "lora",
    "prepare_model_for_kbit_training",
    "quantized_layers",
]
