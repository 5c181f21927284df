"""FP8 layers in the place of a model's linear ones, packed as the format says: transformers quantizes on a GPU alone."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from kbitcheck_reference.formats import fp8 as oracle
from torch import nn

from kbitcheck.backends.fp8 import internals
from kbitcheck.backends.fp8.arithmetic import product
from kbitcheck.backends.internals import kept_wide, mark
from kbitcheck.backends.packed import skipped


def quantize(model: nn.Module, block: int, skip: Sequence[str]) -> None:
    """Replace torch's own linear layers in place, also on the meta device; modules named in ``skip`` stay."""
    internals.fill_slot(product)
    stays = skipped([*skip, *kept_wide(model)])
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not stays(name):
            model.set_submodule(name, _layer(module, block))
    make: Any = transformers.FineGrainedFP8Config
    mark(model, make(weight_block_size=(block, block), modules_to_not_convert=list(skip)), pre_quantized=False)


def _layer(dense: nn.Linear, block: int) -> nn.Module:
    make: Any = internals.LAYER
    with torch.device("meta"):
        layer: nn.Linear = make(
            dense.in_features, dense.out_features, block_size=(block, block), has_bias=dense.bias is not None
        )
    if not dense.weight.is_meta:
        for name, tensor in oracle.pack(dense.weight, "fp8", (block, block)).items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=True))  # as transformers makes them
    layer.bias = dense.bias
    return layer.train(dense.training)
