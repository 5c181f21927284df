"""MXFP4: experts of two 4-bit floats a byte, with an exponent for each 32, as gpt-oss's. Static audit alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.laid_out import LaidOut
from kbitcheck.backends.schemes import Scheme

if TYPE_CHECKING:
    from torch import nn

SCHEME = Scheme("mxfp4", 4)
BLOCK = 32  # numbers that share an exponent (OCP Microscaling Formats 1.0, section 5)


class Mxfp4(LaidOut):
    """The experts' weights; their biases, and everything else, are plain numbers."""

    name = "mxfp4"
    method = "mxfp4"
    schemes = (SCHEME,)

    def lay_out(self, model: nn.Module, config: Mapping[str, Any], skip: Sequence[str]) -> None:
        import torch

        from kbitcheck.backends import packed

        def layout(rows: int, columns: int) -> Any:
            blocks = packed.groups(columns, BLOCK)
            return {
                "blocks": ((rows, blocks, BLOCK // 2), torch.uint8),
                "scales": ((rows, blocks), torch.uint8),
            }

        stays = packed.skipped(config.get("modules_to_not_convert") or ())
        for name, module, wide in packed.stacked(model):
            if not stays(name):
                packed.pack_stack(model, module, wide, SCHEME.name, layout)


BACKEND = Mxfp4()
