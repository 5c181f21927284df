"""HQQ's own layers in the place of a model's linear ones: the package needs no data for it."""

from collections.abc import Sequence
from typing import Any

import transformers
from hqq.core.quantize import BaseQuantizeConfig
from torch import nn

from kbitcheck.backends.hqq.recognise import LAYER
from kbitcheck.backends.internals import mark, replace_linear
from kbitcheck.core.errors import UsageError

SMALLER = (64, 32, 16, 8)


def quantize(model: nn.Module, group: int, skip: Sequence[str]) -> None:
    """Replace torch's own linear layers in place, also on the meta device; modules named in ``skip`` stay."""
    replace_linear(model, skip, lambda name, dense: _layer(name, dense, group))
    make: Any = transformers.HqqConfig
    mark(model, make(nbits=4, group_size=group, axis=1, skip_modules=list(skip)), pre_quantized=False)


def _layer(name: str, dense: nn.Linear, group: int) -> nn.Module:
    config = BaseQuantizeConfig(nbits=4, group_size=_fitting(name, dense.weight.numel(), group), axis=1)
    weights = config["weight_quant_params"]
    training, weights["optimize"] = dense.training, not dense.weight.is_meta  # it looks at numbers
    device, dtype = str(dense.weight.device), dense.weight.dtype
    dense.requires_grad_(False)  # as transformers does: a copy of a bias that trains stays tied to it
    layer: Any = LAYER(dense, quant_config=config, compute_dtype=dtype, device=device)
    layer.quant_config["weight_quant_params"]["optimize"] = True
    made: nn.Module = layer.train(training)
    return made


def _fitting(name: str, numbers: int, group: int) -> int:
    """The largest group, no larger than ``group``, of which the numbers make an even count: a byte has codes of two."""
    for size in (group, *(size for size in SMALLER if size < group)):
        if numbers % (2 * size) == 0:
            return size
    raise UsageError(f"{name}: {numbers} weights make no even count of groups of {SMALLER[-1]}, which HQQ cannot pack")
