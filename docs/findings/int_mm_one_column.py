"""On AVX-512 processors torch's int8 product of a one-column matrix is garbage; int8 layers use it in eval mode."""

import sys

import torch

if torch.backends.cpu.get_cpu_capability() != "AVX512":
    print("not this processor: it has no AVX-512")
    sys.exit(0)
inputs, weight = torch.full((5, 1), 3, dtype=torch.int8), torch.full((4, 1), 2, dtype=torch.int8)
result = torch._int_mm(inputs, weight.t())
print(f"3 * 2 in all places, got {result.unique().tolist()}")
sys.exit(0 if bool((result != 6).any()) else 1)
