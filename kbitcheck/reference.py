"""The reference preparation, and the oracle that conformance is judged by. Importing this imports torch.

This is the package ``kbitcheck_reference`` under a name that is easy to remember.
"""

from kbitcheck_reference import (
    LoraLinear,
    dequantized_weight,
    formats,
    is_quantized,
    is_quantized_parameter,
    lora,
    prepare_model_for_kbit_training,
    quantized_layers,
)

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
