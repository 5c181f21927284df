"""How bitsandbytes' layers compute in training."""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from kbitcheck_reference.formats import bitsandbytes as oracle
from torch import nn

from kbitcheck.backends.bitsandbytes.recognise import BitsAndBytesLayers, is_4bit, scales, state_4bit
from kbitcheck.backends.protocol import Arithmetic

# Devices whose int8 layers train on unpacked weights, and on inputs as they are (``bitsandbytes.matmul``, 0.50.2).
UNROUNDED = ("cpu", "xpu")
INPUTS = (torch.float32, torch.bfloat16, torch.float16)
BYTES = 1 << 13  # that are looked up at once: their indices take four times as much, which fits a cache


class BitsAndBytesArithmetic(Arithmetic):
    """4-bit layers unpack their weight to the compute dtype; int8 layers follow their input."""

    multiplies_unpacked = True

    def compute_dtype(self, module: nn.Module) -> torch.dtype | None:
        dtype = getattr(module, "compute_dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else None

    def product_dtype(self, module: nn.Module, x: torch.Tensor) -> torch.dtype:
        """Where int8 layers train on unpacked weights they call torch's own product, which autocast casts."""
        device = x.device.type
        autocast = device in UNROUNDED and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if autocast else x.dtype

    def unpacked_dtype(self, module: Any) -> torch.dtype | None:
        """The quantization state's dtype: the 4-bit backward unpacks to it first, and the forward does not."""
        state = state_4bit(module)
        return None if state is None else state.dtype

    def unpacked(self, module: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """In ``dtype`` or the state's for 4 bits, always in float32 for int8."""
        if is_4bit(module):
            state = copy.copy(state_4bit(module))
            state.dtype = dtype or state.dtype
            unpacked: torch.Tensor = dequantize_4bit(BitsAndBytesLayers().packed(module).data, state)
            return unpacked
        steps = scales(module).to(torch.float32) * (1.0 / 127.0)
        rows: torch.Tensor = module.weight.data.to(torch.float32).mul_(steps.unsqueeze(1))
        return rows

    def exact(self, module: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        """Bitwise what the oracle unpacks (a property test holds it to that), faster; ``out`` is contiguous.

        Two values a byte: the 256 pairs are looked up, which moves half as much memory as looking up each code.
        """
        if not is_4bit(module):
            values = module.weight.detach().double() if out is None else out.copy_(module.weight.detach())
            return values.mul_(scales(module).detach().double().reshape(-1, 1) / oracle.INT8_STEPS)
        state, packed = state_4bit(module), BitsAndBytesLayers().packed(module).data
        count = state.shape.numel()
        if getattr(state, "packing_format_for_cpu", False) or count % 2:
            weight = oracle.unpack(module)
            return weight if out is None else out.view(weight.shape).copy_(weight)
        if out is None:
            out = torch.empty(tuple(state.shape), dtype=torch.float64, device=packed.device)
        raw = oracle.raw_bytes(packed, count)
        pairs = _pairs(state.quant_type).to(raw.device)
        for codes, piece in zip(raw.split(BYTES), torch.view_as_complex(out.view(-1, 2)).split(BYTES), strict=True):
            torch.index_select(pairs, 0, codes.int(), out=piece)
        oracle.scale_blocks(out.view(-1), oracle.absmax(state), state.blocksize)
        return out.view(tuple(state.shape))

    def rounds_input(self, module: nn.Module) -> bool:
        """int8 does: on accelerators always, on a CPU in eval mode."""
        return not is_4bit(module)

    def round_input(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """int8 on an accelerator rounds its input to int8 too.

        Each row by its largest value, and columns with an outlier not at all (LLM.int8, Dettmers et al. 2022, section 3);
        everything passes through fp16 first. On a CPU the training kernel leaves inputs as they are.
        """
        if is_4bit(module) or x.device.type in UNROUNDED:
            return x
        half = x.to(torch.float16).float()
        threshold = float(BitsAndBytesLayers().state(module)["threshold"] or 0.0)
        outlier = half.abs() >= threshold if threshold else torch.zeros_like(half, dtype=torch.bool)
        scale = half.masked_fill(outlier, 0).abs().amax(dim=-1, keepdim=True) / 127
        rounded = half.div(scale).nan_to_num(0).round() * scale
        columns = outlier.flatten(0, -2).any(dim=0)
        return torch.where(columns, x, rounded.to(x.dtype))

    def bias_after_forward(self, module: Any) -> torch.Tensor:
        """A forward casts the bias in place: to the compute dtype, for int8 to the input's (float32 once prepared)."""
        bias: torch.Tensor = module.bias.to(self.compute_dtype(module) or torch.float32)
        return bias

    def biases_after_forward(self, module: Any) -> Sequence[torch.Tensor]:
        """For int8 the input's may be a half one, under autocast or behind layers that nothing casts."""
        dtypes = [dtype] if (dtype := self.compute_dtype(module)) else INPUTS
        return [module.bias.to(each) for each in dtypes]


@cache
def _pairs(scheme: str) -> torch.Tensor:
    """The values of both codes of each byte, (256,): as one complex number, which is looked up in half the time of a row."""
    codes = oracle.unpack_nibbles(torch.arange(256, dtype=torch.uint8), 512)
    return torch.view_as_complex(oracle.TABLES[scheme][codes.long()].view(256, 2))
