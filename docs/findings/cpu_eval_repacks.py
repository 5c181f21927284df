"""On AVX512-BF16 processors a forward of Linear4bit in eval mode rewrites the packed weight and rounds its scales."""

import sys

import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit


def evaluate(columns: int, rows: int) -> tuple[bool, bool, str]:
    """Whether one forward changed the packed bytes, whether it rounded the scales, and what it raised."""
    layer = Linear4bit(columns, rows, bias=False, compress_statistics=False, quant_type="nf4").to("cpu").eval()
    before, raised = layer.weight.data.view(-1).clone(), ""
    try:
        with torch.no_grad():
            layer(torch.ones(1, 2, columns))
    except Exception as error:
        raised = type(error).__name__
    changed = not torch.equal(before, layer.weight.data.view(-1))
    return changed, layer.weight.quant_state.absmax.dtype == torch.bfloat16, raised


if not has_avx512bf16():
    print("not this processor: it has no AVX512-BF16")
    sys.exit(0)
(repacked, rounded, _), (*_, rows), (*_, columns) = evaluate(64, 64), evaluate(64, 48), evaluate(96, 64)
print(f"64 x 64: bytes changed {repacked}, scales rounded {rounded}; 48 rows: {rows}; 96 columns: {columns}")
sys.exit(0 if repacked and rounded and rows and columns else 1)
