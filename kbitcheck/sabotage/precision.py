"""Faults of KB2xx."""

from __future__ import annotations

from typing import Any

from torch import nn

from kbitcheck import backends
from kbitcheck.sabotage.fault import breaks
from kbitcheck.sabotage.freezing import refuse_freezing


def quantized(model: Any) -> list[Any]:
    """The model's quantized layers."""
    return [m for m in model.modules() if backends.is_quantized(m)]


@breaks("KB201")
def last_norm_left_half(model: Any) -> None:
    norm = model.transformer.ln_f
    norm.weight.data = norm.weight.data.bfloat16()
    norm.bias.data = norm.bias.data.bfloat16()


@breaks("KB215", profile="frozen-half")
def one_norm_of_a_tower_in_half(model: Any) -> None:
    norm = model.transformer.h[1].ln_2
    norm.weight.data = norm.weight.data.bfloat16()
    norm.bias.data = norm.bias.data.bfloat16()


@breaks("KB202")
def positions_left_half(model: Any) -> None:
    weight = model.transformer.wpe.weight
    weight.data = weight.data.bfloat16()


@breaks("KB203")
def norm_nudged(model: Any) -> None:
    model.transformer.h[2].ln_2.weight.data += 1e-4


@breaks("KB204")
def float32_parameter_rounded_through_bf16(model: Any) -> None:
    parameter = dict(model.named_parameters())["transformer.h.1.attn.decay"]
    parameter.data = parameter.data.bfloat16().float()


@breaks("KB204", model="tiny:llama")
def rotary_table_cast(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16()


@breaks("KB205")
def one_nibble_flipped(model: Any) -> None:
    backends.corrupt(quantized(model)[3], "code")


@breaks("KB205", quant="nf4,storage=bf16")
def packed_bytes_upcast(model: Any) -> None:
    weight = quantized(model)[0].weight
    weight.data = weight.data.float()


@breaks("KB206")
def one_scale_off_by_two_per_cent(model: Any) -> None:
    backends.corrupt(quantized(model)[1], "scale")


@breaks("KB206", quant="nf4,double")
def nested_offset_dropped(model: Any) -> None:
    backends.corrupt(quantized(model)[1], "nested")


@breaks("KB206", quant="int8")
def row_scale_off(model: Any) -> None:
    backends.corrupt(quantized(model)[1], "scale")


@breaks("KB207")
def layer_dequantized(model: Any) -> None:
    name, layer = next((n, m) for n, m in model.named_modules() if backends.is_quantized(m))
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(backends.unpacked(layer).float(), requires_grad=False)
    plain.bias = layer.bias
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, plain)


@breaks("KB208")
def head_untied(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


@breaks("KB209", quant="nf4,compute=fp32")
def norm_epsilon_changed(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-2


@breaks("KB210")
def fails_in_eval(model: Any) -> None:
    def refuse(module: nn.Module, args: Any) -> None:
        if not module.training:
            raise RuntimeError("expected mat1 and mat2 to have the same dtype, but got: float != c10::BFloat16")

    model.transformer.h[0].register_forward_pre_hook(refuse)


@breaks("KB211")
def a_half_norm_that_refuses_freezing(model: Any) -> None:
    weight = model.transformer.ln_f.weight
    weight.data = weight.data.half()
    refuse_freezing(weight)


@breaks("KB212")
def norm_moved_to_meta(model: Any) -> None:
    norm = model.transformer.ln_f
    norm.weight = nn.Parameter(norm.weight.to("meta"), requires_grad=False)
