"""The schemes as ``--quant`` writes them, and as transformers configures them. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kbitcheck.backends.schemes import DTYPES, Choice, Option, Scheme, dtype_option, short_dtype
from kbitcheck.core.errors import UsageError

# Nested quantization of the scales, the dtype of the matrix products, the dtype that packed weights are stored as.
OPTIONS = (
    Option("double"),
    dtype_option("compute", "bf16", "fp16", "fp32"),
    dtype_option("storage", "uint8", "bf16", "fp16", "fp32"),
)
SCHEMES = (Scheme("nf4", 4, OPTIONS), Scheme("fp4", 4, OPTIONS), Scheme("int8", 8))


def transformers_config(choice: Choice, skip: Sequence[str] | None) -> Any:
    """A ``transformers.BitsAndBytesConfig``."""
    import torch
    import transformers

    make: Any = transformers.BitsAndBytesConfig
    if choice.scheme == "int8":
        return make(load_in_8bit=True, llm_int8_skip_modules=skip)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type=choice.scheme,
        bnb_4bit_use_double_quant=bool(choice["double"]),
        bnb_4bit_compute_dtype=getattr(torch, DTYPES[choice["compute"]]),
        bnb_4bit_quant_storage=getattr(torch, DTYPES[choice["storage"]]),
        llm_int8_skip_modules=skip,
    )


def described(fields: Mapping[str, Any]) -> tuple[str, Mapping[str, object], Sequence[str]]:
    """Scheme, options and skipped modules of a checkpoint's ``quantization_config``.

    Raises:
        UsageError: a 4-bit type that bitsandbytes does not have.
    """
    skip = tuple(fields.get("llm_int8_skip_modules") or ())
    if not fields.get("load_in_4bit"):
        return "int8", {}, skip
    scheme = fields.get("bnb_4bit_quant_type", "fp4")
    if scheme not in ("nf4", "fp4"):
        raise UsageError(
            f"this checkpoint is quantized as {scheme!r}; kbitcheck knows {', '.join(s.name for s in SCHEMES)}"
        )
    dtypes = {
        "compute": fields.get("bnb_4bit_compute_dtype", "float32"),
        "storage": fields.get("bnb_4bit_quant_storage", "uint8"),
    }
    options = {name: short_dtype(dtype) or dtype for name, dtype in dtypes.items()}
    return scheme, {"double": fields.get("bnb_4bit_use_double_quant", False), **options}, skip
