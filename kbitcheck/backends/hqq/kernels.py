"""HQQ's layers without numbers: its own operators run on fakes of the state."""

from collections.abc import Mapping
from typing import Any

import torch

from kbitcheck.backends.protocol import Kernels


class HqqKernels(Kernels):
    """Scales, zeros and biases are plain attributes."""

    def fake(self, module: Any, real: Mapping[str, Any], tensor: Any) -> None:
        module.meta = {n: tensor(each) if isinstance(each, torch.Tensor) else each for n, each in module.meta.items()}
        if module.bias is not None and "bias" not in real:
            module.bias = tensor(module.bias)
