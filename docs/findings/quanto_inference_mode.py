"""optimum-quanto's int4 layers raise in torch.inference_mode; its int8 layers, and torch.no_grad, do not."""

import sys

import torch
from optimum.quanto import QLinear, qint4, qint8

for kind in (qint8, qint4):
    layer = QLinear.from_module(torch.nn.Linear(64, 32), weights=kind)
    layer.freeze()
    x = torch.zeros(2, 64)
    with torch.no_grad():
        layer(x)
    try:
        with torch.inference_mode():
            layer(x)
    except RuntimeError as error:
        print(f"{kind.name}: {error}")
        sys.exit(0)
    print(f"{kind.name}: no error")
sys.exit(1)
