"""GPTQ: codes of 2, 3, 4 or 8 bits in groups of columns, as AutoGPTQ and GPTQModel save them. Importing this imports no torch.

What runs is GPTQModel's layer of plain torch, with weights that are packed to the nearest codes: no data calibrates them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.laid_out import RunByPackage
from kbitcheck.backends.protocol import Arithmetic, Recognition
from kbitcheck.backends.schemes import Choice, Option, Scheme

if TYPE_CHECKING:
    from torch import nn

    from kbitcheck.backends.packed import Layout

BITS = (2, 3, 4, 8)
LEFT = "models are packed by GPTQ to 4 bits alone here"
# Columns that share a scale, and whether they are grouped by their size (act-order).
OPTIONS = (Option("group", ("128", "64", "32", "all"), "128"), Option("act"))


class Gptq(RunByPackage):
    """Every linear layer of the blocks; ``dynamic`` says which modules differ, as GPTQModel reads it."""

    name = "gptq"
    method = "gptq"
    package = "gptqmodel"
    schemes = tuple(
        Scheme(f"gptq-int{bits}", bits, OPTIONS if bits == 4 else (), stored_alone="" if bits == 4 else LEFT)
        for bits in BITS
    )

    def layers(self) -> Recognition:
        from kbitcheck.backends.gptq.recognise import GptqLayers

        return GptqLayers([scheme.name for scheme in self.schemes])

    @cached_property
    def arithmetic(self) -> Arithmetic:
        from kbitcheck.backends.gptq.arithmetic import GptqArithmetic

        return GptqArithmetic()

    def put(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        from kbitcheck.backends.gptq.quantize import quantize

        quantize(model, choice, skip)

    def describes(self, config: Mapping[str, Any]) -> bool:
        return super().describes(config) and config.get("bits", 4) in BITS

    def described(self, config: Mapping[str, Any]) -> tuple[str, Mapping[str, object], Sequence[str]]:
        return f"gptq-int{config.get('bits', 4)}", {}, ()

    def lay_out(self, model: nn.Module, config: Mapping[str, Any], skip: Sequence[str]) -> None:
        from kbitcheck.backends import packed

        scheme = self.described(config)[0]
        wanted = [each for group in config.get("modules_in_block_to_quantize") or () for each in group]
        head: Any = model.get_output_embeddings() if config.get("lm_head") else None  # type: ignore[operator]
        for name, module in packed.linears(model, in_blocks=False):
            if not packed.IN_BLOCK.search(name) and module is not head:
                continue
            settings = _settings(config, name)
            if settings and (not wanted or name.endswith(tuple(f".{each}" for each in wanted))):
                packed.pack_linear(model, name, scheme, _layout(settings))
        for name, module, wide in packed.stacked(model):
            if settings := _settings(config, name):
                packed.pack_stack(model, module, wide, scheme, _layout(settings))


def _settings(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The settings of one module; empty where it stays unquantized."""
    for pattern, changes in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
            return {} if pattern.startswith("-:") else {**config, **(changes or {})}
    return config


def _layout(config: Mapping[str, Any]) -> Layout:
    import torch

    from kbitcheck.backends.packed import groups

    bits, size = config.get("bits", 4), config.get("group_size", 128)

    def tensors(rows: int, columns: int) -> Any:
        scales = groups(columns, size)
        return {
            "qweight": ((-(-columns * bits // 32), rows), torch.int32),
            "qzeros": ((scales, -(-rows * bits // 32)), torch.int32),
            "scales": ((scales, rows), torch.float16),
            "g_idx": ((columns,), torch.int32),
        }

    return tensors


BACKEND = Gptq()
