"""torchao: weights in int8 by rows, as tensors of a class of their own. Importing this imports neither torch nor torchao."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from kbitcheck.backends.protocol import Arithmetic, Backend, Packing, Recognition
from kbitcheck.backends.schemes import Choice, Scheme
from kbitcheck.core.errors import UsageError

SCHEME = Scheme("torchao-int8", 8)
KIND = "Int8WeightOnlyConfig"
# Its product has no backward for the input (0.18.0): where adapters train, the gradient ends at the layer.
CUT = "Int8DynamicActivationInt8WeightConfig"


class TorchAO(Backend):
    """The backend; its parts are imported when first asked for."""

    name = "torchao"
    method = "torchao"
    libraries = ("torchao",)
    schemes = (SCHEME,)

    @cached_property
    def recognition(self) -> Recognition:
        from kbitcheck.backends.torchao.recognise import TorchAOWeights

        return TorchAOWeights()

    @cached_property
    def arithmetic(self) -> Arithmetic:
        from kbitcheck.backends.torchao.arithmetic import TorchAOArithmetic

        return TorchAOArithmetic()

    @cached_property
    def packing(self) -> Packing:
        from kbitcheck.backends.torchao.packing import TorchAOPacking

        return TorchAOPacking()

    def unavailable(self) -> str:
        if not importlib.util.find_spec(self.name):
            return "torchao is not installed: pip install 'kbitcheck[torchao]'"
        old = int(importlib.metadata.version("transformers").partition(".")[0]) < 5
        return "torchao's weights need transformers 5 or later" if old else ""

    def described(self, config: Mapping[str, Any]) -> tuple[str, Mapping[str, object], Sequence[str]]:
        kind = (config.get("quant_type") or {}).get("default", {}).get("_type", "")
        if kind != KIND:
            why = ", whose product has no backward" if kind == CUT else ""
            raise UsageError(
                f"this checkpoint is quantized by torchao as {kind or '?'}{why}; kbitcheck supports {KIND}"
            )
        return SCHEME.name, {}, tuple(config.get("modules_to_not_convert") or ())

    def config(self, choice: Choice, skip: Sequence[str] | None) -> Any:
        import torchao.quantization
        import transformers

        make: Any = transformers.TorchAoConfig
        return make(torchao.quantization.Int8WeightOnlyConfig(), modules_to_not_convert=skip)


BACKEND = TorchAO()
