"""Which layers hold a weight that optimum-quanto packed, by the class of the weight."""

from collections.abc import Mapping
from typing import Any

import torch
from kbitcheck_reference.formats import quanto as oracle
from torch import nn

from kbitcheck.backends.protocol import Recognition
from kbitcheck.backends.quanto import internals
from kbitcheck.core.errors import NotApplicable

internals.allow_copies()


class QuantoWeights(Recognition):
    """int8 and int4 matrices; those in the layout of a GPU's kernel are not read."""

    def holds(self, module: nn.Module) -> bool:
        return oracle.holds(module)

    def packs(self, parameter: torch.Tensor) -> bool:
        return isinstance(parameter, internals.BYTES | internals.BITS)

    def scheme(self, module: Any) -> str:
        return str(module.weight.qtype.name).replace("qint", "quanto-int")

    def shape(self, module: Any) -> tuple[int, int]:
        rows, columns = module.weight.shape
        return int(rows), int(columns)

    def state(self, module: Any) -> Mapping[str, Any]:
        weight = module.weight
        if isinstance(weight, internals.BYTES):
            return {"scale": weight._scale, "axis": weight.axis}
        group = {"group_size": weight._group_size, "axis": weight.axis}
        if isinstance(weight, internals.TILED):
            return {"scale_shift": weight._scale_shift, **group}
        return {"scale": weight._scale, "shift": weight._shift, **group}

    def corrupt(self, module: Any, part: str, factor: float = 1.02) -> None:
        weight = module.weight
        tiled = isinstance(weight, internals.TILED)
        if part == "code":
            data = weight._data if isinstance(weight, internals.BYTES) else weight._data._data
            data.view(-1)[0] ^= 1
        elif part == "scale":
            (weight._scale_shift if tiled else weight._scale).view(-1)[0] *= factor
        else:
            raise NotApplicable(f"{self.scheme(module)} has no {part}")
