"""On a CPU bitsandbytes scales int8 products by 6.200124e-05; 1 / 127 ** 2 is 6.2000124e-05: a zero is missing."""

import sys

import bitsandbytes  # noqa: F401  (registers the operators)
import torch

product = torch.tensor([[127 * 127]], dtype=torch.int32)
one = torch.ones(1)
product_scaled = float(torch.ops.bitsandbytes.int8_mm_dequant(product, one, one, dtype=torch.float32))
print(f"127 * 127 scaled by 1 / 127 ** 2 is {product_scaled:.8f}")
sys.exit(0 if abs(product_scaled - 1) > 1e-5 else 1)
