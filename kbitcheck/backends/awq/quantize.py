"""GPTQModel's plain layers in the place of a model's linear ones, packed as the format says: AWQ's own quantizer needs data."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from gptqmodel.nn_modules.qlinear import torch_awq as layers
from kbitcheck_reference.formats import awq as oracle
from torch import nn

from kbitcheck.backends.awq.arithmetic import HALF
from kbitcheck.backends.internals import mark, replace_linear
from kbitcheck.backends.schemes import Choice
from kbitcheck.core.errors import UsageError

SMALLER = (128, 64, 32, 16)


def quantize(model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
    """Replace torch's own linear layers in place, also on the meta device; modules named in ``skip`` stay."""
    group = None if choice["group"] == "all" else int(choice["group"])
    unfit = [
        name for name, each in model.named_modules() if type(each) is nn.Linear and each.out_features % oracle.ROWS
    ]
    stay = [*skip, *unfit]
    replace_linear(model, stay, lambda name, dense: _layer(dense, choice.scheme, group))
    make: Any = transformers.AwqConfig
    described = make(bits=oracle.BITS, group_size=group or -1, zero_point=True, modules_to_not_convert=stay or None)
    mark(model, described, pre_quantized=True)
    if unfit and not any(isinstance(each, layers.AwqTorchLinear) for each in model.modules()):
        raise UsageError(f"no layer can be packed by AWQ: of none is the number of outputs a multiple of {oracle.ROWS}")


def _layer(dense: nn.Linear, scheme: str, group: int | None) -> nn.Module:
    rows, columns = dense.weight.shape
    size = _fitting(columns, group)
    settings = {
        "bits": oracle.BITS,
        "group_size": size,
        "sym": False,
        "desc_act": False,
        "bias": dense.bias is not None,
    }
    half = dense.weight.dtype if dense.weight.dtype in HALF else torch.float16
    with torch.device(dense.weight.device):
        make: Any = layers.AwqTorchLinear
        layer: Any = make(in_features=columns, out_features=rows, register_buffers=True, dtype=half, **settings)
    if not dense.weight.is_meta:
        for name, tensor in oracle.pack(dense.weight.cpu(), scheme, size).items():
            cast = half if tensor.is_floating_point() else tensor.dtype
            setattr(layer, name, tensor.to(dense.weight.device, cast))
    if dense.bias is not None:
        layer.bias = dense.bias.detach().to(half)
    layer.post_init()
    made: nn.Module = layer.train(dense.training)
    return made


def _fitting(columns: int, group: int | None) -> int:
    """The largest group of the published sizes, no larger than ``group``, that fills the columns; all of them where none does."""
    sizes = [size for size in SMALLER if group and size <= group and columns % size == 0]
    return sizes[0] if sizes else columns
