"""Which linear layers hold a weight that torchao packed: the layer's class is torch's own, the weight's is not."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchao.quantization import Int8Tensor

from kbitcheck.backends.protocol import Recognition
from kbitcheck.core.errors import NotApplicable


class TorchAOWeights(Recognition):
    """``Int8Tensor`` as the weight of any module, where no input is rounded too."""

    def holds(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return isinstance(weight, Int8Tensor) and weight.act_quant_kwargs is None

    def packs(self, parameter: torch.Tensor) -> bool:
        return isinstance(parameter, Int8Tensor)

    def scheme(self, module: Any) -> str:
        return "torchao-int8"

    def shape(self, module: Any) -> tuple[int, int]:
        rows, columns = module.weight.shape
        return int(rows), int(columns)

    def state(self, module: Any) -> Mapping[str, Any]:
        weight = module.weight
        return {"scale": weight.scale, "zero_point": weight.zero_point, "block_size": tuple(weight.block_size)}

    def corrupt(self, module: Any, part: str, factor: float = 1.02) -> None:
        weight = module.weight
        if part == "code":
            weight.qdata.view(-1)[0] ^= 1
        elif part == "scale":
            weight.scale.view(-1)[0] *= factor
        else:
            raise NotApplicable(f"{self.scheme(module)} has no {part}")
