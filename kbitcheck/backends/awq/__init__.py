"""AWQ: codes of 4 bits in groups of columns, in AutoAWQ's layout for matrix products. Importing this imports no torch.

What runs is GPTQModel's layer of plain torch, with weights that are packed to the nearest codes: no data calibrates them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.laid_out import RunByPackage
from kbitcheck.backends.protocol import Arithmetic, Recognition
from kbitcheck.backends.schemes import Choice, Option, Scheme

if TYPE_CHECKING:
    from torch import nn

# Columns that share a scale and a zero, of all layers; smaller where no layer's columns fill them. Other layers are left out.
GROUP = Option("group", ("128", "64", "32", "16", "all"), "128")
SCHEME = Scheme("awq-int4", 4, (GROUP,))


class Awq(RunByPackage):
    """Every linear layer but the head and those that ``modules_to_not_convert`` names."""

    name = "awq"
    method = "awq"
    package = "gptqmodel"
    rows = 8
    schemes = (SCHEME,)

    def layers(self) -> Recognition:
        from kbitcheck.backends.awq.recognise import AwqLayers

        return AwqLayers([SCHEME.name])

    @cached_property
    def arithmetic(self) -> Arithmetic:
        from kbitcheck.backends.awq.arithmetic import AwqArithmetic

        return AwqArithmetic()

    def put(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        from kbitcheck.backends.awq.quantize import quantize

        quantize(model, choice, skip)

    def describes(self, config: Mapping[str, Any]) -> bool:
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        return super().describes(config) and version == "gemm" and config.get("bits", 4) == SCHEME.bits

    def lay_out(self, model: nn.Module, config: Mapping[str, Any], skip: Sequence[str]) -> None:
        import torch

        from kbitcheck.backends import packed

        size = config.get("group_size", 128)

        def layout(rows: int, columns: int) -> Any:
            scales = packed.groups(columns, size)
            return {
                "qweight": ((columns, rows * SCHEME.bits // 32), torch.int32),
                "qzeros": ((scales, rows * SCHEME.bits // 32), torch.int32),
                "scales": ((scales, rows), torch.float16),
            }

        stays = packed.skipped([*skip, *(config.get("modules_to_not_convert") or ())])
        packed.pack_all(model, SCHEME.name, layout, stays)


BACKEND = Awq()
