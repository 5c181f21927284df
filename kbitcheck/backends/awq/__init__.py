"""AWQ: codes of 4 bits in groups of columns, in AutoAWQ's layout for matrix products. Static audit alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.protocol import Backend, Recognition
from kbitcheck.backends.schemes import Scheme

if TYPE_CHECKING:
    from torch import nn

SCHEME = Scheme("awq-int4", 4)


class Awq(Backend):
    """Every linear layer but the head and those that ``modules_to_not_convert`` names."""

    name = "awq"
    method = "awq"
    schemes = (SCHEME,)
    static_only = "its layers are not run: sizes are those of its published layout"

    @cached_property
    def recognition(self) -> Recognition:
        from kbitcheck.backends.packed import PackedHolders

        return PackedHolders([SCHEME.name])

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
        for name, _ in packed.linears(model, in_blocks=False):
            if not stays(name):
                packed.pack_linear(model, name, SCHEME.name, layout)
        for name, module, wide in packed.stacked(model):
            if not stays(name):
                packed.pack_stack(model, module, wide, SCHEME.name, layout)


BACKEND = Awq()
