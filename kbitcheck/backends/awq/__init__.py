"""AWQ: codes of 4 bits in groups of columns, in AutoAWQ's layout for matrix products. Static audit alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.laid_out import LaidOut
from kbitcheck.backends.schemes import Scheme

if TYPE_CHECKING:
    from torch import nn

SCHEME = Scheme("awq-int4", 4)


class Awq(LaidOut):
    """Every linear layer but the head and those that ``modules_to_not_convert`` names."""

    name = "awq"
    method = "awq"
    schemes = (SCHEME,)

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
