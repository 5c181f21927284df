"""compressed-tensors: what LLM Compressor saves. Importing this imports neither torch nor the library.

A model's first forward unpacks every weight for good, whatever the checkpoint: what trains is a model of plain numbers, with the
library's own forward on each layer. Weights alone are quantized in what runs here; where inputs are rounded too, the library's
rounding has no backward, so that gradients end at each layer.
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

GROUP = Option("group", ("all", "32", "128"), "all", every_model=False)
CUT = "its rounding of inputs has no backward, so that gradients end at each layer"
SCHEMES = (
    Scheme("compressed-tensors-int4", 4, (GROUP,)),
    Scheme("compressed-tensors-int8", 8, (GROUP,)),
    Scheme("compressed-tensors-int8-dynamic", 8, stored_alone=CUT),
    Scheme("compressed-tensors-fp8", 8, stored_alone=CUT),
)
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


class CompressedTensors(RunByPackage):
    """Every linear layer that ``targets`` of a group of the configuration match and ``ignore`` does not."""

    name = "compressed_tensors"
    method = "compressed-tensors"
    package = "compressed_tensors"
    schemes = SCHEMES
    static_only = "its first forward unpacks every weight: sizes are those of its published layout"
    unpacked_by = "the first forward"

    def layers(self) -> Recognition:
        from kbitcheck.backends.compressed_tensors.recognise import CompressedLayers

        return CompressedLayers([scheme.name for scheme in SCHEMES])

    @cached_property
    def arithmetic(self) -> Arithmetic:
        from kbitcheck.backends.compressed_tensors.arithmetic import CompressedArithmetic

        return CompressedArithmetic()

    def describes(self, config: Mapping[str, Any]) -> bool:
        cache = config.get("kv_cache_scheme") or {}
        if not super().describes(config) or cache.get("strategy", "tensor") != "tensor" or cache.get("dynamic"):
            return False
        groups = list((config.get("config_groups") or {}).values())
        weights = [group.get("weights") or {} for group in groups]
        plain = all(w.get("strategy") in ("tensor", "channel", "group", "block") for w in weights)
        named = {group.get("format") or config.get("format") for group in groups}
        return not groups or (plain and named <= set(FORMATS))

    def described(self, config: Mapping[str, Any]) -> tuple[str, Mapping[str, object], Sequence[str]]:
        from kbitcheck.backends.compressed_tensors.layout import scheme_of

        groups = list((config.get("config_groups") or {}).values())
        return (scheme_of(groups[0]) if groups else SCHEMES[0].name), {}, ()

    def put(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        from kbitcheck.backends.compressed_tensors.quantize import quantize

        quantize(model, choice, skip)

    def lay_out(self, model: nn.Module, config: Mapping[str, Any], skip: Sequence[str]) -> None:
        from kbitcheck.backends.compressed_tensors.layout import lay_out

        lay_out(model, config)

    def unpack(self, model: nn.Module) -> None:
        from kbitcheck.backends.packed import unpack_all

        unpack_all(model, "weight_scale")


BACKEND = CompressedTensors()
