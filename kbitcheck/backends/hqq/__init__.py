"""HQQ: codes of 1 to 8 bits with a scale and a zero a group, found without a calibrator. Importing this imports no torch.

Its own package quantizes models and runs them. transformers 5 takes no part: it loads neither a model nor a checkpoint so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.laid_out import RunByPackage
from kbitcheck.backends.protocol import Arithmetic, Kernels, Recognition
from kbitcheck.backends.schemes import Choice, Option, Scheme

if TYPE_CHECKING:
    from torch import nn

PREFIX = "hqq-int"
# Numbers that share a scale. A layer whose numbers make no even count of groups gets the largest smaller group that does.
GROUP = Option("group", ("64", "128", "32", "16", "8"), "64", every_model=False)
LEFT = "models are quantized by HQQ to 4 bits alone here"
BITS = (4, 8, 3, 2, 1)
SCHEMES = (Scheme("hqq-int4", 4, (GROUP,)), *(Scheme(f"{PREFIX}{n}", n, stored_alone=LEFT) for n in BITS[1:]))


class Hqq(RunByPackage):
    """Every linear layer but those that ``skip_modules`` names, or those that ``quant_config`` names one by one."""

    name = "hqq"
    method = "hqq"
    package = "hqq"
    schemes = SCHEMES
    static_only = "transformers 5 does not load it: sizes are those of its published layout"

    def layers(self) -> Recognition:
        from kbitcheck.backends.hqq.recognise import HqqLayers

        return HqqLayers([scheme.name for scheme in SCHEMES])

    @cached_property
    def arithmetic(self) -> Arithmetic:
        from kbitcheck.backends.hqq.arithmetic import HqqArithmetic

        return HqqArithmetic()

    @cached_property
    def kernels(self) -> Kernels:
        from kbitcheck.backends.hqq.kernels import HqqKernels

        return HqqKernels()

    def describes(self, config: Mapping[str, Any]) -> bool:
        return super().describes(config) and all(
            each["nbits"] in BITS and each.get("channel_wise", True) for each in _settings(config)
        )

    def described(self, config: Mapping[str, Any]) -> tuple[str, Mapping[str, object], Sequence[str]]:
        first = next(iter(_settings(config)), {"nbits": 4})
        return f"{PREFIX}{first['nbits']}", {}, ()

    def put(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        from kbitcheck.backends.hqq.quantize import quantize

        quantize(model, int(choice["group"]), skip)

    def lay_out(self, model: nn.Module, config: Mapping[str, Any], skip: Sequence[str]) -> None:
        from kbitcheck.backends.hqq.layout import lay_out

        lay_out(model, config)


def _settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of weights in a ``quantization_config``: one for all layers, or one for each kind of layer."""
    own = config.get("quant_config") or {}
    single = [own] if "weight_quant_params" in own else list(own.values())
    return [each["weight_quant_params"] for each in single if each]


BACKEND = Hqq()
