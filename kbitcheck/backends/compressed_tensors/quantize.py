"""Packed weights in the place of a model's linear ones, as the format says, and unpacked as a first forward leaves them."""

from collections.abc import Sequence
from typing import Any

import torch
from kbitcheck_reference.formats import compressed_tensors as oracle
from torch import nn

from kbitcheck.backends.compressed_tensors import internals
from kbitcheck.backends.packed import linears, skipped
from kbitcheck.backends.schemes import Choice


def quantize(model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
    """Quantize torch's own linear layers in place, also on the meta device; modules named in ``skip`` stay."""
    stays = skipped(skip)
    ignored = [name for name, _ in linears(model, in_blocks=False) if stays(name)]
    wide = None if choice["group"] == "all" else int(choice["group"])
    bits = oracle.BITS[choice.scheme]
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if wide else "channel"}
    described = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {**weights, **({"group_size": wide} if wide else {})}}
        },
    }
    dense: Any
    for dense in internals.mark(model, described):
        if dense.weight.is_meta:
            dense.weight_shape = nn.Parameter(torch.empty(2, dtype=torch.int64, device="meta"), requires_grad=False)
            dense.quantization_status = internals.UNPACKED
        else:
            internals.fill(dense, oracle.pack(dense.weight, choice.scheme, wide))
            internals.unpack(dense)
