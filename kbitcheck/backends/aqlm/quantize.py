"""The library's layers in the place of a model's linear ones, packed as the format says: its own quantizer needs data."""

from collections.abc import Sequence
from typing import Any

import transformers
from aqlm import QuantizedLinear
from kbitcheck_reference.formats import aqlm as oracle
from torch import nn

from kbitcheck.backends.internals import kept_wide, mark, replace_linear
from kbitcheck.backends.packed import skipped
from kbitcheck.core.errors import UsageError

BITS = 10  # of a code, in one codebook: with 8 the library takes a kernel that computes in float32 alone, with 16 it is larger than recipes
COLUMNS = (8, 4, 2)


def quantize(model: nn.Module, skip: Sequence[str]) -> None:
    """Replace torch's own linear layers in place, also on the meta device; modules named in ``skip`` stay."""
    stays = skipped([*skip, *kept_wide(model)])
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and not stays(n)}
    wide = next((size for size in COLUMNS if all(m.in_features % size == 0 for m in linear.values())), None)
    if wide is None:
        raise UsageError("no model with a layer of odd columns can be packed by AQLM")
    replace_linear(model, skip, lambda name, dense: _layer(dense, wide))
    plain = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    # Weights, as the library's own quantizer names them, and modules, as transformers 5 reads the list.
    named = [*plain, *(f"{n}.weight" for n in plain)]
    make: Any = transformers.AqlmConfig
    described = make(
        in_group_size=wide, out_group_size=1, num_codebooks=1, nbits_per_codebook=BITS,
        linear_weights_not_to_quantize=named,
    )  # fmt: skip
    mark(model, described, pre_quantized=True)


def _layer(dense: nn.Linear, wide: int) -> nn.Module:
    rows, columns = dense.weight.shape
    make: Any = QuantizedLinear
    layer: Any = make(
        columns,
        rows,
        wide,
        1,
        1,
        BITS,
        bias=dense.bias is not None,
        device=dense.weight.device,
        dtype=dense.weight.dtype,
    )
    if not dense.weight.is_meta:
        for name, tensor in oracle.pack(dense.weight.cpu(), "aqlm", columns=wide, codebooks=1, bits=BITS).items():
            kept = getattr(layer, name)
            kept.data.copy_(tensor.to(kept.dtype))
    if dense.bias is not None:
        layer.bias.data = dense.bias.detach().clone()
    made: nn.Module = layer.train(dense.training)
    return made
