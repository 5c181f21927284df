"""GPTQModel's plain layers in the place of a model's linear ones, packed as the format says: its own quantizer needs data."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from gptqmodel.nn_modules.qlinear import torch as layers
from kbitcheck_reference.formats import gptq as oracle
from torch import nn

from kbitcheck.backends.internals import mark, replace_linear
from kbitcheck.backends.schemes import Choice

VERSION = 2  # of the format: what the layer computes with, to which checkpoints of the first version are turned


def quantize(model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
    """Replace torch's own linear layers in place, also on the meta device; modules named in ``skip`` stay."""
    group = None if choice["group"] == "all" else int(choice["group"])
    replace_linear(model, skip, lambda name, dense: _layer(dense, choice.scheme, group, act=bool(choice["act"])))
    make: Any = transformers.GPTQConfig
    act, version = bool(choice["act"]), f"gptq_v{VERSION}"
    described = make(bits=oracle.BITS[choice.scheme], group_size=group or -1, sym=True, desc_act=act, format=version)
    mark(model, described, pre_quantized=True)


def _layer(dense: nn.Linear, scheme: str, group: int | None, *, act: bool) -> nn.Module:
    rows, columns = dense.weight.shape
    settings = {"bits": oracle.BITS[scheme], "group_size": group or columns, "sym": True, "desc_act": act}
    with torch.device(dense.weight.device):
        make: Any = layers.TorchLinear
        layer: Any = make(in_features=columns, out_features=rows, bias=dense.bias is not None, **settings)
    if not dense.weight.is_meta:
        order = dense.weight.norm(dim=0).argsort(descending=True) if act else None
        for name, tensor in oracle.pack(dense.weight.cpu(), scheme, group, order=order, version=VERSION).items():
            setattr(layer, name, tensor.to(dense.weight.device))
    if dense.bias is not None:
        layer.bias = dense.bias.detach().half()
    layer.qzero_format(VERSION)
    layer.optimized = True  # it would compile its unpacking
    layer.post_init()
    made: nn.Module = layer.train(dense.training)
    return made
