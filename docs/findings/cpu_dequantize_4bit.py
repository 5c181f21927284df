"""On AVX-512 processors bitsandbytes unpacks a 4-bit weight wrongly if its rows are no multiple of the block size."""

import sys

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit


def error(rows: int, columns: int, blocksize: int = 64) -> float:
    """Relative distance of what bitsandbytes unpacks from what the format says: code[nibble] * absmax[block]."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    nibbles = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 0xF], dim=1).view(-1).int()
    absmax = state.absmax.repeat_interleave(blocksize)[: weight.numel()]
    exact = (state.code[nibbles] * absmax).view(rows, columns)
    return float((dequantize_4bit(packed, state) - exact).norm() / exact.norm())


if torch.backends.cpu.get_cpu_capability() != "AVX512":
    print("not this processor: it has no AVX-512")
    sys.exit(0)
full, ragged = error(96, 128), error(96, 96)
print(f"blocks of 64: (96, 128) is off by {full:.2%}, (96, 96) by {ragged:.2%}")
sys.exit(0 if full < 1e-6 and ragged > 0.01 else 1)
