"""bitsandbytes: NF4 and FP4 in blocks, and LLM.int8. Importing this imports neither torch nor bitsandbytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.bitsandbytes import config
from kbitcheck.backends.protocol import Arithmetic, Backend, Kernels, Packing, Recognition
from kbitcheck.backends.schemes import Choice
from kbitcheck.core.finding import Finding, read_findings

if TYPE_CHECKING:
    from torch import nn


class BitsAndBytes(Backend):
    """The backend; its parts are imported when first asked for."""

    name = "bitsandbytes"
    method = "bitsandbytes"
    schemes = config.SCHEMES

    @cached_property
    def recognition(self) -> Recognition:
        from kbitcheck.backends.bitsandbytes.recognise import BitsAndBytesLayers

        return BitsAndBytesLayers()

    @cached_property
    def arithmetic(self) -> Arithmetic:
        from kbitcheck.backends.bitsandbytes.arithmetic import BitsAndBytesArithmetic

        return BitsAndBytesArithmetic()

    @cached_property
    def packing(self) -> Packing:
        from kbitcheck.backends.bitsandbytes.packing import BitsAndBytesPacking

        return BitsAndBytesPacking()

    @cached_property
    def kernels(self) -> Kernels:
        from kbitcheck.backends.bitsandbytes.kernels import BitsAndBytesKernels

        return BitsAndBytesKernels()

    def unavailable(self) -> str:
        return "" if importlib.util.find_spec(self.name) else "bitsandbytes is not installed: pip install bitsandbytes"

    def describes(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method", self.method) == self.method and "config_groups" not in config

    def described(self, fields: Mapping[str, Any]) -> tuple[str, Mapping[str, object], Sequence[str]]:
        return config.described(fields)

    def config(self, choice: Choice, skip: Sequence[str] | None) -> Any:
        return config.transformers_config(choice, skip)

    def steady(self, model: nn.Module) -> None:
        from kbitcheck.backends.bitsandbytes.quirks import never_repacked

        never_repacked(model)

    def findings(self) -> Sequence[Finding]:
        return read_findings(Path(__file__).with_name("findings.toml"))


BACKEND = BitsAndBytes()
