"""On AVX512-BF16 processors an evaluation that a save follows leaves the scales of a Linear4bit transposed."""

import sys

import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit

if not has_avx512bf16():
    print("not this processor: it has no AVX512-BF16")
    sys.exit(0)
layer = Linear4bit(128, 64, bias=False, compress_statistics=False, quant_type="nf4").to("cpu")
before = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
with torch.no_grad():
    layer.eval()(torch.ones(1, 2, 128))
layer.state_dict()
after = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
change = float(((after - before).abs() / before.abs().max()).max())
print(f"the weight changed by {change:.1%} of its largest element")
sys.exit(0 if change > 2**-7 else 1)  # rounding scales to bfloat16 changes less
