"""bitsandbytes: NF4 and FP4 in blocks, and LLM.int8. Importing this imports neither torch nor bitsandbytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.protocol import Arithmetic, Backend, Kernels, Packing, Recognition
from kbitcheck.backends.schemes import DTYPES, Choice, Option, Scheme, dtype_option, short_dtype
from kbitcheck.core.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


# Nested quantization of the scales, the dtype of the matrix products, the dtype that packed weights are stored as.
OPTIONS = (
    Option("double"),
    dtype_option("compute", "bf16", "fp16", "fp32"),
    dtype_option("storage", "uint8", "bf16", "fp16", "fp32"),
    # Stacked ones, which are no linear layers.
    Option("experts", ("as-loaded", "parametrize"), "as-loaded", every_model=False),
)

REPACKS = (
    "on this processor, which has AVX512-BF16, bitsandbytes repacks 4-bit weights in a forward in eval mode without gradients, and"
    " training goes on without theirs; before an evaluation set `support_avx512bf16_for_cpu = False` on every Linear4bit"
)


class BitsAndBytes(Backend):
    """The backend; its parts are imported when first asked for."""

    name = "bitsandbytes"
    method = "bitsandbytes"
    libraries = ("bitsandbytes",)
    promises_upcast = True
    replaces = ("Linear", "Conv1D")
    stored_state = (
        r"(?P<weight>.+)\.(?:(?:nested_)?(?:absmax|quant_map)|quant_state\.bitsandbytes__\w+|SCB|weight_format)"
    )
    schemes = (Scheme("nf4", 4, OPTIONS), Scheme("fp4", 4, OPTIONS), Scheme("int8", 8))

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

    def described(self, config: Mapping[str, Any]) -> tuple[str, Mapping[str, object], Sequence[str]]:
        skip = tuple(config.get("llm_int8_skip_modules") or ())
        if not config.get("load_in_4bit"):
            return "int8", {}, skip
        scheme = config.get("bnb_4bit_quant_type", "fp4")
        if scheme not in ("nf4", "fp4"):
            names = ", ".join(s.name for s in self.schemes)
            raise UsageError(f"this checkpoint is quantized as {scheme!r}; kbitcheck knows {names}")
        dtypes = {
            "compute": config.get("bnb_4bit_compute_dtype", "float32"),
            "storage": config.get("bnb_4bit_quant_storage", "uint8"),
        }
        options = {name: short_dtype(dtype) or dtype for name, dtype in dtypes.items()}
        return scheme, {"double": config.get("bnb_4bit_use_double_quant", False), **options}, skip

    def config(self, choice: Choice, skip: Sequence[str] | None) -> Any:
        import torch
        import transformers

        make: Any = transformers.BitsAndBytesConfig
        if choice.scheme == "int8":
            return make(load_in_8bit=True, llm_int8_skip_modules=skip)
        return make(
            load_in_4bit=True,
            bnb_4bit_quant_type=choice.scheme,
            bnb_4bit_use_double_quant=bool(choice["double"]),
            bnb_4bit_compute_dtype=getattr(torch, DTYPES[choice["compute"]]),
            bnb_4bit_quant_storage=getattr(torch, DTYPES[choice["storage"]]),
            llm_int8_skip_modules=skip,
        )

    def complete(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        if choice.scheme != "int8" and choice["experts"] == "parametrize":
            from kbitcheck.backends.bitsandbytes.experts import parametrize

            parametrize(model, choice, skip)

    def steady(self, model: nn.Module) -> None:
        """Switch off the repacking of 4-bit weights in a forward in eval mode on CPUs with AVX512-BF16.

        It rewrites the packed weights in place, rounds their scales to bfloat16, drops the nested state, and raises
        where the rows are no multiple of 32 or the columns of 64 (0.50.2, ``_convert_weight_packed_for_cpu``). It serves
        inference alone; with it, what a check sees would depend on the CPU, and looking at a model would change it.
        """
        for module in model.modules():
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.__dict__["support_avx512bf16_for_cpu"] = False

    def unsteady(self, model: nn.Module) -> str:
        import bitsandbytes.nn

        modules: Any = bitsandbytes.nn.modules
        return REPACKS if any(_repacking(model)) and modules.has_avx512bf16() else ""

    def release(self, model: nn.Module) -> None:
        for module in _repacking(model):
            module.support_avx512bf16_for_cpu = True

    def optimizers(self) -> Sequence[type]:
        import bitsandbytes.optim
        import torch

        return [
            c for c in vars(bitsandbytes.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)
        ]

    def warnings(self) -> Mapping[str, str]:
        return {
            r"Input type into Linear4bit is \S+, but bnb_4bit_compute_dtype=torch.float32": "compute dtype",
            r"FP4 quantization state not initialized": "quantization state",
        }


def _repacking(model: nn.Module) -> Iterator[Any]:
    """The layers that repack their weight where the processor has the instructions."""
    for module in model.modules():
        layer: Any = module
        if hasattr(layer, "support_avx512bf16_for_cpu") and layer.weight.device.type == "cpu":
            yield layer


BACKEND = BitsAndBytes()
