"""AQLM: sums of vectors of codebooks, as its authors publish them. Importing this imports no torch.

What runs is the library's layer without a kernel of its own, with weights that are packed to the nearest codes: no data calibrates them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.laid_out import RunByPackage
from kbitcheck.backends.protocol import Arithmetic, Recognition
from kbitcheck.backends.schemes import Choice, Scheme

if TYPE_CHECKING:
    from torch import nn

SCHEME = Scheme("aqlm", 2)


class Aqlm(RunByPackage):
    """Every linear layer but those whose weights ``linear_weights_not_to_quantize`` names, or the head where it names none."""

    name = "aqlm"
    method = "aqlm"
    package = "aqlm"
    schemes = (SCHEME,)

    def layers(self) -> Recognition:
        from kbitcheck.backends.aqlm.recognise import AqlmLayers

        return AqlmLayers([SCHEME.name])

    @cached_property
    def arithmetic(self) -> Arithmetic:
        from kbitcheck.backends.aqlm.arithmetic import AqlmArithmetic

        return AqlmArithmetic()

    def put(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        from kbitcheck.backends.aqlm.quantize import quantize

        quantize(model, skip)

    def describes(self, config: Mapping[str, Any]) -> bool:
        return super().describes(config) and config.get("nbits_per_codebook", 16) <= 16

    def lay_out(self, model: nn.Module, config: Mapping[str, Any], skip: Sequence[str]) -> None:
        import torch

        from kbitcheck.backends import packed

        high, wide = config.get("out_group_size", 1), config.get("in_group_size", 8)
        count, bits = config.get("num_codebooks", 1), config.get("nbits_per_codebook", 16)
        dtype = next(model.parameters()).dtype

        def layout(rows: int, columns: int) -> Any:
            return {
                "codes": ((rows // high, columns // wide, count), torch.int8 if bits <= 8 else torch.int16),
                "codebooks": ((count, 2**bits, high, wide), dtype),
                "scales": ((rows // high, 1, 1, 1), dtype),
            }

        named = config.get("linear_weights_not_to_quantize")
        stay = skip if named is None else [name.removesuffix(".weight") for name in named]
        packed.pack_all(model, SCHEME.name, layout, packed.skipped(stay))


BACKEND = Aqlm()
