"""GPTQModel's plain layers in the place of a model's linear ones, packed as the format says: AWQ's own quantizer needs data."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from gptqmodel.nn_modules.qlinear import torch_awq as layers
from kbitcheck_reference.formats import awq as oracle
from torch import nn

from kbitcheck.backends.awq.arithmetic import HALF
from kbitcheck.backends.internals import kept_wide, mark, replace_linear
from kbitcheck.backends.packed import skipped
from kbitcheck.backends.schemes import Choice
from kbitcheck.core.errors import UsageError

KERNEL = "torch_awq"  # without it, transformers takes another where a checkpoint is loaded on a CPU
SIZES = (128, 64, 32, 16)


def quantize(model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
    """Replace torch's own linear layers in place, also on the meta device; modules named in ``skip`` stay, and what cannot be packed."""
    stays = skipped([*skip, *kept_wide(model)])
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and not stays(n)}
    whole = [each for each in linear.values() if each.out_features % oracle.ROWS == 0]
    group = None if choice["group"] == "all" else _group([each.in_features for each in whole], int(choice["group"]))
    fits = [name for name, each in linear.items() if each in whole and each.in_features % (group or 1) == 0]
    if linear and not fits:
        raise UsageError(f"no layer can be packed by AWQ: of none is the number of outputs a multiple of {oracle.ROWS}")
    stay = [*skip, *(name for name in linear if name not in fits)]
    replace_linear(model, stay, lambda name, dense: _layer(dense, choice.scheme, group))
    make: Any = transformers.AwqConfig
    described = make(
        bits=oracle.BITS, group_size=group or -1, zero_point=True, modules_to_not_convert=stay or None, backend=KERNEL
    )
    mark(model, described, pre_quantized=True)


def _group(columns: Sequence[int], largest: int) -> int | None:
    """The largest published size of groups, no larger than ``largest``, that fills the columns of any layer; None where none does."""
    return next((size for size in SIZES if size <= largest and any(n % size == 0 for n in columns)), None)


def _layer(dense: nn.Linear, scheme: str, group: int | None) -> nn.Module:
    rows, columns = dense.weight.shape
    size = group or columns
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
