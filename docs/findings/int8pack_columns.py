"""torch's int8 product in bfloat16 ends the process on AVX-512 processors where columns are no multiple of 32."""

import subprocess
import sys

import torch

CODE = """
import torch
weight, scale = torch.randint(-128, 127, (64, COLUMNS), dtype=torch.int8), torch.rand(64).bfloat16()
torch._weight_int8pack_mm(torch.randn(3, COLUMNS).bfloat16(), weight, scale)
"""
capability = torch.backends.cpu.get_cpu_capability()
for columns in (96, 108):
    ended = subprocess.run([sys.executable, "-c", CODE.replace("COLUMNS", str(columns))], capture_output=True)
    print(f"{columns} columns on {capability}: exit code {ended.returncode}")
sys.exit(0 if ended.returncode < 0 or capability != "AVX512" else 1)
