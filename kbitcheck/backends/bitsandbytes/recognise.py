"""Which modules hold a weight that bitsandbytes packed, and what they hold. Found by parameter class and state."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from kbitcheck.backends.protocol import Recognition
from kbitcheck.core.errors import NotApplicable


class BitsAndBytesLayers(Recognition):
    """``Linear4bit`` and ``Linear8bitLt``, whatever else owns their parameters, and parametrized parameters."""

    def holds(self, module: nn.Module) -> bool:
        if isinstance(module, ParametrizationList):
            return state_4bit(module) is not None
        weight: Any = module._parameters.get("weight")  # its own: an adapter's wrapper shows its base layer's
        if isinstance(weight, Params4bit):
            return weight.quant_state is not None
        return isinstance(weight, Int8Params) and scales(module) is not None

    def packs(self, parameter: torch.Tensor) -> bool:
        return isinstance(parameter, Params4bit | Int8Params)

    def packed(self, module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.weight if self.multiplies(module) else module.original
        return weight

    def multiplies(self, module: nn.Module) -> bool:
        return not isinstance(module, ParametrizationList)

    def scheme(self, module: Any) -> str:
        return str(state_4bit(module).quant_type) if is_4bit(module) else "int8"

    def emptied(self, module: nn.Module) -> str:
        if self.holds(module):
            return ""
        if isinstance(module, Linear4bit):
            return str(getattr(getattr(module, "quant_state", None), "quant_type", ""))
        return "int8" if isinstance(module, Linear8bitLt) and scales(module) is not None else ""

    def shape(self, module: Any) -> tuple[int, int]:
        *rows, columns = state_4bit(module).shape if is_4bit(module) else module.weight.shape
        return math.prod(rows), int(columns)

    def experts(self, module: nn.Module) -> int:
        return 1 if self.multiplies(module) else math.prod(state_4bit(module).shape[:-2])

    def state(self, module: Any) -> Mapping[str, Any]:
        """The fields of ``QuantState``, nested ones too; or the int8 scales and settings."""
        if not self.multiplies(module):  # its dtype is that of the numbers which the owner reads
            return {name: field for name, field in _fields(state_4bit(module)) if name != "dtype"}
        weight = module.weight
        if not is_4bit(module):
            state = getattr(module, "state", None)
            settings = {n: getattr(state, n, None) for n in ("threshold", "has_fp16_weights")}
            return {"SCB": scales(module), **settings}
        settings = {n: getattr(weight, n, None) for n in ("bnb_quantized", "quant_storage", "compress_statistics")}
        settings["kept by the layer too"] = getattr(module, "quant_state", None) is not None
        return {**dict(_fields(weight.quant_state)), **settings}

    def laid_out_before(self, module: Any) -> torch.Tensor | None:
        """In eval mode, on CPUs with AVX512-BF16; a save lays the codes back, and not the scales."""
        state: Any = copy.copy(state_4bit(module))
        if not getattr(state, "packing_format_for_cpu", False):
            return module.weight.data if hasattr(state, "original_qshape") else None
        state.original_nested = False  # of no use here: the scales were rounded, and stay so
        packed: torch.Tensor = _convert_weight_packed_for_cpu_inverse(module.weight.data, state)[0]
        return packed

    def scratch(self, module: nn.Module) -> list[torch.Tensor]:
        """The outliers' columns, which int8 keeps."""
        state = getattr(module, "state", None)
        return [v for v in vars(state).values() if isinstance(v, torch.Tensor)] if state is not None else []

    def bare(self, module: nn.Module) -> nn.Module:
        layer = copy.copy(module)
        layer.__class__ = next(c for c in type(module).__mro__ if c.__module__.startswith("bitsandbytes."))
        vars(layer).pop("forward", None)
        vars(layer).update({name: empty for name, empty in vars(nn.Module()).items() if name.endswith("_hooks")})
        return layer

    def corrupt(self, module: Any, part: str, factor: float = 1.02) -> None:
        state = state_4bit(module)
        if part == "code":
            self.packed(module).data.view(torch.uint8).view(-1)[0] ^= 1
        elif part == "nested" and state is not None and state.nested:
            state.offset = torch.zeros_like(state.offset)
        elif part == "scale" and state is not None:
            state.absmax[0] *= factor
        elif part == "scale":
            scales(module)[0] *= factor
        else:
            raise NotApplicable(f"{self.scheme(module)} has no {part}")


def is_4bit(module: Any) -> bool:
    """True for NF4 and FP4, False for int8."""
    return isinstance(module, ParametrizationList) or isinstance(module.weight, Params4bit)


def state_4bit(module: Any) -> Any:
    """The quantization state of a layer's weight, or of a parametrized parameter; None where there is none."""
    if isinstance(module, ParametrizationList):
        own = (each for each in module if isinstance(each, Bnb4bitParametrization))
        return next((each.quant_state for each in own), None)
    return getattr(module.weight, "quant_state", None)


def scales(module: Any) -> Any:
    """The row scales of an int8 layer: its weight's until the first forward hands them to the layer's state."""
    own = getattr(module.weight, "SCB", None)
    return own if own is not None else getattr(getattr(module, "state", None), "SCB", None)


def _fields(quant_state: Any, prefix: str = "") -> list[tuple[str, Any]]:
    names = ("absmax", "code", "blocksize", "quant_type", "dtype", "shape", "offset")
    fields = [(prefix + n, getattr(quant_state, n, None)) for n in names]
    fields.append((prefix + "packing", bool(getattr(quant_state, "packing_format_for_cpu", False))))
    nested = getattr(quant_state, "state2", None)
    if nested is None:
        return [*fields, (prefix + "nested", None)]
    return [*fields, *_fields(nested, prefix + "nested.")]
