"""Faults of KB2xx."""

from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.sabotage.fault import adds, breaks, casts
from kbitcheck.sabotage.helpers import HALF, cast, corrupt, dequantize, half, quantized, refuse_freezing
from kbitcheck.sabotage.hooks import change_output


@breaks("KB201")
def last_norm_left_half(model: Any) -> None:
    model.transformer.ln_f.bfloat16()


@casts("KB201")
def casts_what_is_called_layer_norm(model: Any) -> None:
    cast(model, "layer_norm")


@breaks("KB202")
def positions_left_half(model: Any) -> None:
    model.transformer.wpe.bfloat16()


@casts("KB202")
def casts_norms_alone(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()


@breaks("KB203")
def norm_nudged(model: Any) -> None:
    model.transformer.h[1].ln_2.weight.data += 1e-4


@breaks("KB203", model="tiny:t5", quant="int8", checkpointing="non-reentrant")
def norms_rounded_through_bfloat16(model: Any) -> None:
    for module in model.modules():
        if type(module).__name__ == "T5LayerNorm":
            module.weight.data = module.weight.data.bfloat16().float()


@casts("KB203", model="tiny:llama")
def scales_norms_before_the_cast(model: Any) -> None:
    for name, parameter in half(model):
        if "norm" in name:
            parameter.data = parameter.data * (1 + 2.0**-6)
    cast(model)


@breaks("KB204")
def float32_parameter_rounded_through_bf16(model: Any) -> None:
    parameter = model.get_parameter("transformer.h.1.attn.unread_float32")
    parameter.data = parameter.data.bfloat16().float()


@breaks("KB204", model="tiny:llama")
def rotary_table_cast(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16()


@breaks("KB204", alone=True)
def epsilon_moved_by_a_hundredth(model: Any) -> None:
    model.transformer.ln_f.eps = 1.01e-5  # a second call changes nothing more, which another rule would report


@casts("KB204", model="tiny:t5", quant="nf4,storage=fp16,compute=fp32")
def casts_everything_to_bfloat16_first(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and not backends.is_packed(parameter):
            parameter.data = parameter.data.bfloat16().float()
    cast(model)


@breaks("KB205")
def one_nibble_flipped(model: Any) -> None:
    corrupt(quantized(model)[3], "code")


@breaks("KB205", quant="nf4,storage=bf16")
def packed_bytes_upcast(model: Any) -> None:
    weight = quantized(model)[0].weight
    weight.data = weight.data.float()


@casts("KB205", quant="nf4,storage=bf16")
def casts_packed_weights_too(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.dtype in HALF:
            parameter.data = parameter.data.float()


@breaks("KB206")
def one_scale_off_by_two_per_cent(model: Any) -> None:
    corrupt(quantized(model)[1], "scale")


@breaks("KB206", quant="nf4,double")
def nested_offset_dropped(model: Any) -> None:
    corrupt(quantized(model)[1], "nested")


@breaks("KB206", quant="int8")
def row_scale_off(model: Any) -> None:
    corrupt(quantized(model)[1], "scale")


@breaks("KB206", model="tiny:t5", quant="int8", checkpointing="non-reentrant")
def a_row_scale_off_in_the_encoder(model: Any) -> None:
    corrupt(quantized(model.encoder)[0], "scale", 1.001)


@adds("KB206", quant="nf4,double")
def flattens_nested_scales(model: Any) -> None:
    for layer in quantized(model):
        corrupt(layer, "nested")


@breaks("KB207")
def layer_dequantized(model: Any) -> None:
    dequantize(model, next(name for name, _ in backends.quantized_layers(model)), torch.float32)


@breaks("KB207", model="tiny:llama", quant="int8")
def last_layer_dequantized(model: Any) -> None:
    dequantize(model, [name for name, _ in backends.quantized_layers(model)][-1])


@casts("KB207")
def dequantizes_projections(model: Any) -> None:
    for name in [name for name, _ in backends.quantized_layers(model) if name.endswith("c_fc")]:
        dequantize(model, name, torch.float32)
    cast(model)


@breaks("KB208")
def head_untied(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


@casts("KB208")
def rebinds_what_it_casts(model: Any) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype in HALF and not backends.is_packed(parameter):
                setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))


@breaks("KB209", quant="nf4,compute=fp32")
def norm_epsilon_changed(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-2


@breaks("KB209")
def decodes_wrongly(model: Any) -> None:
    """Only with a cache, where tokens come in one at a time."""
    change_output(model.transformer.ln_f, lambda x: x.flip(-1) if x.shape[1] == 1 else x)


@breaks("KB209")
def padding_in_front_is_read(model: Any) -> None:
    def look(module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not mask[:, 0].all():
            kwargs = {**kwargs, "attention_mask": None}
        return args, kwargs

    model.register_forward_pre_hook(look, with_kwargs=True)


@adds("KB209", quant="nf4,compute=fp32")
def runs_norms_in_bfloat16(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            change_output(module, lambda x: x.bfloat16().float())


@breaks("KB210")
def fails_in_eval(model: Any) -> None:
    def refuse(module: nn.Module, args: Any) -> None:
        if not module.training:
            raise RuntimeError("expected mat1 and mat2 to have the same dtype, but got: float != c10::BFloat16")

    model.transformer.h[0].register_forward_pre_hook(refuse)


@breaks("KB210")
def embeddings_of_ones_own_get_no_gradient(model: Any) -> None:
    def look(module: nn.Module, args: Any, kwargs: Any) -> Any:
        embeddings = kwargs.get("inputs_embeds")
        return args, kwargs if embeddings is None else {**kwargs, "inputs_embeds": embeddings.detach()}

    model.register_forward_pre_hook(look, with_kwargs=True)


@adds("KB210", model="tiny:llama")
def casts_the_head_back(model: Any) -> None:
    model.lm_head.to(torch.bfloat16)


@breaks("KB211")
def a_half_norm_that_refuses_freezing(model: Any) -> None:
    norm = model.transformer.ln_f
    norm.weight.data = norm.weight.data.half()
    refuse_freezing(norm.weight)


@adds("KB211")
def trains_positions_in_float16(model: Any) -> None:
    positions = model.transformer.wpe.half()
    refuse_freezing(positions.weight)


@breaks("KB212")
def norm_moved_to_meta(model: Any) -> None:
    norm = model.transformer.ln_f
    norm.weight = nn.Parameter(norm.weight.to("meta"), requires_grad=False)


@adds("KB212")
def offloads_positions(model: Any) -> None:
    model.transformer.wpe.to("meta")


@breaks("KB215", profile="frozen-half")
def one_norm_of_a_tower_in_half(model: Any) -> None:
    model.transformer.h[1].ln_2.bfloat16()


@casts("KB215", model="tiny:llama", profile="frozen-half")
def casts_norms_of_attention_alone(model: Any) -> None:
    cast(model, "input_layernorm")
