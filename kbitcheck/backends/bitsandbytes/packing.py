"""Packed weights and their states on the meta device, to the byte."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any
from unittest import mock

import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn
from transformers.pytorch_utils import Conv1D

from kbitcheck.backends.bitsandbytes.recognise import BitsAndBytesLayers, state_4bit
from kbitcheck.backends.protocol import Packing
from kbitcheck.backends.schemes import Choice

META = torch.device("meta")


class BitsAndBytesPacking(Packing):
    """bitsandbytes' own functions run on the meta device, and say what a packed weight and its state look like."""

    def as_on_meta(self) -> AbstractContextManager[Any]:
        # Never to be made on the meta device.
        functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
        values = cache(functional.get_4bit_type)
        # Each weight has its own copy of the type's 16 values, which are computed once.
        return mock.patch.object(functional, "get_4bit_type", lambda *args, **named: values(*args, **named).clone())

    def quantize_empty(self, model: nn.Module, dtype: torch.dtype) -> None:
        with self.as_on_meta():
            for module in model.modules():
                if isinstance(module, Linear4bit | Linear8bitLt):
                    _quantize(module, dtype)

    def while_quantizing(self, module: Any, dtype: torch.dtype) -> int:
        """The weight as read, the copy of it that is packed, and what comes of it.

        4 bits: the weight is on the device, and packed there (transformers 5.23, ``Bnb4bitQuantize``). The scales are in
        float32 at first, and nested ones stand twice beside what they are quantized to (``functional.quantize_4bit``).
        int8: the weight goes back to the host, and comes again in float16 (``Bnb8bitQuantize``, ``Int8Params._quantize``);
        before transformers 5 it was on the host until then.
        """
        recognition = BitsAndBytesLayers()
        (rows, columns), packed = recognition.shape(module), int(recognition.packed(module).nbytes)
        read = rows * columns * dtype.itemsize
        if isinstance(module, Linear8bitLt):
            again = rows * columns * torch.float16.itemsize
            return (read if transformers.__version__ >= "5" else 0) + again + packed + 4 * rows
        if getattr(module, "source_cls", None) is Conv1D:  # transposed, and then made contiguous
            read *= 2
        state = state_4bit(module)
        scales = 4 * -(-rows * columns // int(state.blocksize))
        return read + packed + scales * (2 if state.nested else 1)

    def undivided(self, choice: Choice) -> str:
        """FSDP and DeepSpeed divide float dtypes; bitsandbytes can store 4 bits as one (its docs, "FSDP-QLoRA")."""
        if choice.scheme == "int8":
            return "packed int8 weights are not divided: there is no float storage for them, as there is for nf4"
        if choice["storage"] == "uint8":
            return (
                "packed weights stored as uint8 are not divided: --quant nf4,storage=bf16 stores them as a float dtype"
            )
        return ""

    def divisible(self, choice: Choice) -> Mapping[str, str]:
        return {} if choice.scheme == "int8" or not self.undivided(choice) else {"storage": "bf16"}


def _quantize(module: Any, dtype: torch.dtype) -> None:
    full = torch.empty(module.out_features, module.in_features, dtype=dtype, device=META)
    settings = {k: v for k, v in module.weight.__dict__.items() if k != "SCB"}
    kind: Any = Params4bit if isinstance(module, Linear4bit) else Int8Params
    weight = kind(full, requires_grad=False, **settings)
    weight._quantize(META)  # ``to`` leaves meta tensors alone (private, seen in bitsandbytes 0.50.2)
    module.weight = weight
    if isinstance(module, Linear4bit):
        state = module.quant_state = weight.quant_state
        if state.nested:
            state.offset = torch.zeros((), dtype=state.offset.dtype)  # ``state_dict`` reads it
