"""compressed-tensors: what LLM Compressor saves. Importing this imports neither torch nor the library.

A model's first forward unpacks every weight for good, whatever the checkpoint: what trains is a model of plain numbers, with the
library's own forward on each layer. Weights alone are quantized in what runs here; where inputs are rounded too, the library's
rounding has no backward, so that gradients end at each layer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.laid_out import LaidOut
from kbitcheck.backends.protocol import Arithmetic, Recognition
from kbitcheck.backends.schemes import Choice, Option, Scheme
from kbitcheck.core.errors import UsageError
from kbitcheck.core.finding import Finding, read_findings

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


class CompressedTensors(LaidOut):
    """Every linear layer that ``targets`` of a group of the configuration match and ``ignore`` does not."""

    name = "compressed_tensors"
    method = "compressed-tensors"
    schemes = SCHEMES
    static_only = "its first forward unpacks every weight: sizes are those of its published layout"
    unpacked_by = "the first forward"

    @cached_property
    def recognition(self) -> Recognition:
        if self.not_on_load():
            return super().recognition
        from kbitcheck.backends.compressed_tensors.recognise import CompressedLayers

        return CompressedLayers([scheme.name for scheme in SCHEMES])

    @cached_property
    def arithmetic(self) -> Arithmetic:
        from kbitcheck.backends.compressed_tensors.arithmetic import CompressedArithmetic

        return CompressedArithmetic()

    def not_on_load(self) -> str:
        installed = importlib.util.find_spec("compressed_tensors")
        return "" if installed else "compressed-tensors is not installed: pip install 'kbitcheck[compressed-tensors]'"

    def describes(self, config: Mapping[str, Any]) -> bool:
        if not super().describes(config) or config.get("kv_cache_scheme"):
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

    def quantize(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        if why := self.not_on_load() or self.scheme(choice.scheme).stored_alone:
            raise UsageError(f"{choice} cannot be run: {why}")
        from kbitcheck.backends.compressed_tensors.quantize import quantize

        quantize(model, choice, skip)

    def lay_out(self, model: nn.Module, config: Mapping[str, Any], skip: Sequence[str]) -> None:
        from kbitcheck.backends.compressed_tensors.layout import lay_out

        lay_out(model, config)

    def unpack(self, model: nn.Module) -> None:
        from kbitcheck.backends.packed import unpack_all

        unpack_all(model, "weight_scale")

    def findings(self) -> Sequence[Finding]:
        return read_findings(Path(__file__).with_name("findings.toml"))


BACKEND = CompressedTensors()
