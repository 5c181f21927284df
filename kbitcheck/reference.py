"""The reference preparation, and the oracle that conformance is judged by. Importing this imports torch.

This is the package ``kbitcheck_reference`` under a name that is easy to remember.
"""

from kbitcheck_reference import (
    FP4,
    NF4,
    LoraLinear,
    dequantize_absmax,
    dequantize_blockwise4,
    dequantize_int8,
    dequantized_weight,
    is_quantized,
    is_quantized_parameter,
    lora,
    prepare_model_for_kbit_training,
    quantized_layers,
)

__all__ = [
    "FP4",
    "NF4",
    "LoraLinear",
    "dequantize_absmax",
    "dequantize_blockwise4",
    "dequantize_int8",
    "dequantized_weight",
    "is_quantized",
    "is_quantized_parameter",
    "lora",
    "prepare_model_for_kbit_training",
    "quantized_layers",
]
