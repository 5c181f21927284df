"""Faults of KB308 that show where a model's weights leave their place and come back."""

from typing import Any

import torch
from torch import nn

from kbitcheck.sabotage.fault import adds, breaks
from kbitcheck.sabotage.helpers import corrupt, quantized, subclass


@breaks("KB308", quant="int8")
def scale_lost_on_a_move(model: Any) -> None:
    """As scales that a layer keeps beside its parameters."""

    def apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        moved = nn.Module._apply(self, *args, **kwargs)
        corrupt(moved, "scale")
        return moved

    subclass(quantized(model)[3], _apply=apply)


@breaks("KB308")
def state_dict_loaded_into_another_scale(model: Any) -> None:
    quantized(model)[2].register_load_state_dict_post_hook(lambda module, keys: corrupt(module, "scale"))


@breaks("KB308", quant="int8")
def offloaded_weight_spoiled(model: Any) -> None:
    """As by a kernel that writes into a weight which was fetched for one forward."""
    layer = quantized(model)[1]
    run = type(layer).forward

    def forward(self: Any, x: torch.Tensor) -> Any:
        if hasattr(self, "_hf_hook"):  # accelerate's, which calls this while the weight is there
            self.weight.data.view(-1)[:8] = 0
        return run(self, x)

    subclass(layer, forward=forward)


@adds("KB308")
def rescales_where_a_state_dict_is_loaded(model: Any) -> None:
    for layer in quantized(model)[1::4]:
        layer.register_load_state_dict_post_hook(lambda module, keys: corrupt(module, "scale"))


@breaks("KB308")
def hooked_layer_forgets_its_input(model: Any) -> None:
    """As a forward that was made for a layer without accelerate's hooks."""
    layer = quantized(model)[1]
    run = type(layer).forward

    def forward(self: Any, x: torch.Tensor) -> Any:
        return run(self, x.detach() if hasattr(self, "_hf_hook") and self.training else x)

    subclass(layer, forward=forward)


@adds("KB308")
def rescales_what_came_from_a_checkpoint(model: Any) -> None:
    if model.hf_quantizer.pre_quantized:
        corrupt(quantized(model)[2], "scale")
