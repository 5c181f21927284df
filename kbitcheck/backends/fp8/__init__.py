"""Fine-grained FP8: e4m3 numbers with a scale for each block of rows and columns, as DeepSeek's. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.laid_out import LaidOut
from kbitcheck.backends.protocol import Arithmetic, Kernels, Recognition
from kbitcheck.backends.schemes import Choice, Option, Scheme
from kbitcheck.core.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

# Rows and columns that share a scale. Checkpoints have 128; recipes are smaller than that.
SCHEME = Scheme("fp8", 8, (Option("block", ("128", "32"), "128"),))
# The first that was seen to have a backward.
TRAINABLE = (5, 23)


class Fp8(LaidOut):
    """Every linear layer and stack of experts but those that ``modules_to_not_convert`` names, or the head where it names none."""

    name = "fp8"
    method = "fp8"
    schemes = (SCHEME,)
    static_only = "transformers unpacks it on load where there is no GPU: sizes are those of its published layout"

    @cached_property
    def recognition(self) -> Recognition:
        if self.not_on_load():
            return super().recognition
        from kbitcheck.backends.fp8.recognise import Fp8Layers

        return Fp8Layers([SCHEME.name])

    @cached_property
    def arithmetic(self) -> Arithmetic:
        from kbitcheck.backends.fp8.arithmetic import Fp8Arithmetic

        return Fp8Arithmetic()

    @cached_property
    def kernels(self) -> Kernels:
        if self.not_on_load():
            return Kernels()
        from kbitcheck.backends.fp8.kernels import Fp8Kernels

        return Fp8Kernels()

    def not_on_load(self) -> str:
        installed = tuple(map(int, version("transformers").split(".")[:2]))
        return "" if installed >= TRAINABLE else "FP8 layers have a backward in transformers 5.23 or later"

    def describes(self, config: Mapping[str, Any]) -> bool:
        return super().describes(config) and config.get("expert_dtype", "fp8") == "fp8"

    def quantize(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        if why := self.not_on_load():
            raise UsageError(why)
        from kbitcheck.backends.fp8.quantize import quantize

        quantize(model, int(choice["block"]), skip)

    def lay_out(self, model: nn.Module, config: Mapping[str, Any], skip: Sequence[str]) -> None:
        import torch

        from kbitcheck.backends import packed

        block = config.get("weight_block_size")  # without it a checkpoint is of AutoFP8: a scale for a whole weight
        scale = torch.uint8 if config.get("scale_fmt") == "ue8m0" else torch.float32  # a byte, or a number
        static = config.get("activation_scheme") == "static"

        def layout(rows: int, columns: int) -> Any:
            shape = () if block is None else (packed.groups(rows, block[0]), packed.groups(columns, block[1]))
            return {
                "weight": ((rows, columns), torch.float8_e4m3fn),
                "weight_scale_inv": (shape, scale),
                **({"activation_scale": ((), torch.float32)} if static else {}),
            }

        named = config.get("modules_to_not_convert") or config.get("ignored_layers")
        stays = packed.skipped(skip if named is None else named)
        packed.pack_all(model, SCHEME.name, layout, stays)


BACKEND = Fp8()
