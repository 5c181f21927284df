"""bitsandbytes: Linear4bit and Linear8bitLt, found by their parameter and its quantization state."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Int8Params, Params4bit

NAME = "bitsandbytes"
# Devices whose int8 layers train on unpacked weights, and inputs as they are (``bitsandbytes.matmul``).
UNROUNDED = ("cpu", "xpu")


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether the module holds a packed 4-bit or row-wise 8-bit weight, with the state that unpacks it."""
    weight: Any = module._parameters.get("weight")  # its own: an adapter's wrapper shows its base layer's
    if isinstance(weight, Params4bit):
        return weight.quant_state is not None
    return isinstance(weight, Int8Params) and _scales(module) is not None


def is_packed(parameter: torch.Tensor) -> bool:
    """Whether a parameter is a packed weight, of a subclass too."""
    return isinstance(parameter, (Params4bit, Int8Params))


def kind(module: torch.nn.Module) -> str:
    """``nf4``, ``fp4`` or ``int8``."""
    weight = module.weight
    return str(weight.quant_state.quant_type) if isinstance(weight, Params4bit) else "int8"


def shape(module: torch.nn.Module) -> tuple[int, int]:
    """(out features, in features) of the weight when unpacked."""
    weight: Any = module.weight
    rows, columns = weight.quant_state.shape if isinstance(weight, Params4bit) else weight.shape
    return int(rows), int(columns)


def compute_dtype(module: torch.nn.Module) -> torch.dtype | None:
    """The dtype a 4-bit layer computes in; None where it follows its input (int8)."""
    found = getattr(module, "compute_dtype", None)
    return found if isinstance(found, torch.dtype) else None


def state_dtype(module: torch.nn.Module) -> torch.dtype | None:
    """The dtype a 4-bit weight is unpacked to before the product; None for int8."""
    state = getattr(module.weight, "quant_state", None)
    return None if state is None else state.dtype


def state(module: torch.nn.Module) -> Mapping[str, Any]:
    """The fields of the quantization state: tensors and plain values, nested state included."""
    weight: Any = module.weight
    if not isinstance(weight, Params4bit):
        state = getattr(module, "state", None)
        settings = {n: getattr(state, n, None) for n in ("threshold", "has_fp16_weights")}
        return {"SCB": _scales(module), **settings}
    settings = {n: getattr(weight, n, None) for n in ("bnb_quantized", "quant_storage", "compress_statistics")}
    settings["kept by the layer too"] = getattr(module, "quant_state", None) is not None
    return {**dict(_fields(weight.quant_state)), **settings}


def scratch(module: torch.nn.Module) -> list[torch.Tensor]:
    """Tensors that the layer's own kernels keep from one call to the next, as int8 keeps the outliers' columns."""
    state = getattr(module, "state", None)
    return [v for v in vars(state).values() if isinstance(v, torch.Tensor)] if state is not None else []


def bare(module: torch.nn.Module) -> torch.nn.Module:
    """The library's own layer on the same weight and state: no subclass, no hook, no forward of the instance's."""
    layer = copy.copy(module)
    layer.__class__ = next(c for c in type(module).__mro__ if c.__module__.startswith(f"{NAME}."))
    vars(layer).pop("forward", None)
    vars(layer).update({name: empty for name, empty in vars(torch.nn.Module()).items() if name.endswith("_hooks")})
    return layer


def dequantized(module: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight as the layer's own kernels unpack it: (out, in), in ``dtype`` or the state's (float32 for int8)."""
    weight: Any = module.weight
    if isinstance(weight, Params4bit):
        state = copy.copy(weight.quant_state)
        state.dtype = dtype or state.dtype
        unpacked: torch.Tensor = dequantize_4bit(weight.data, state)
        return unpacked
    scales = _scales(module)
    rows: torch.Tensor = weight.data.to(torch.float32) * (scales.to(torch.float32) * (1.0 / 127.0)).unsqueeze(1)
    return rows


def rounded_input(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer computes with in training instead of its input: int8 on an accelerator rounds that to int8 too.

    Each row by its largest value, and columns with an outlier not at all (LLM.int8, Dettmers et al. 2022, section 3);
    everything passes through fp16 first. On a CPU bitsandbytes' training kernel leaves inputs as they are.
    """
    if not isinstance(module.weight, Int8Params) or x.device.type in UNROUNDED:
        return x
    half = x.to(torch.float16).float()
    threshold = float(state(module)["threshold"] or 0.0)
    outlier = half.abs() >= threshold if threshold else torch.zeros_like(half, dtype=torch.bool)
    scale = half.masked_fill(outlier, 0).abs().amax(dim=-1, keepdim=True) / 127
    rounded = half.div(scale).nan_to_num(0).round() * scale
    columns = outlier.flatten(0, -2).any(dim=0)
    return torch.where(columns, x, rounded.to(x.dtype))


def _fields(quant_state: Any, prefix: str = "") -> list[tuple[str, Any]]:
    names = ("absmax", "code", "blocksize", "quant_type", "dtype", "shape", "offset")
    found = [(prefix + n, getattr(quant_state, n, None)) for n in names]
    found.append((prefix + "packing", bool(getattr(quant_state, "packing_format_for_cpu", False))))
    nested = getattr(quant_state, "state2", None)
    if nested is None:
        return [*found, (prefix + "nested", None)]
    return [*found, *_fields(nested, prefix + "nested.")]


def _scales(module: torch.nn.Module) -> Any:
    weight: Any = module.weight
    scales = getattr(weight, "SCB", None)
    return scales if scales is not None else getattr(getattr(module, "state", None), "SCB", None)
