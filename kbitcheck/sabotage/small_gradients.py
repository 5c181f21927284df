"""Faults of KB303 and KB304 in one place of a step, most of them smaller than the rounding of a whole model."""

from typing import Any

import torch

from kbitcheck.sabotage.fault import adds, breaks
from kbitcheck.sabotage.gradients import scale_after
from kbitcheck.sabotage.helpers import blocks, quantized
from kbitcheck.sabotage.hooks import change_gradient, change_input, change_output

LLAMA = {"model": "tiny:llama"}


@breaks("KB303")
def gradient_scaled_by_a_backward_pre_hook(model: Any) -> None:
    layer = quantized(model)[1]
    layer.register_full_backward_pre_hook(lambda module, gradients: tuple(1.05 * g for g in gradients))


@breaks("KB304", **LLAMA, config={"num_hidden_layers": 16})
def gradient_off_by_a_thousandth_in_one_block_of_sixteen(model: Any) -> None:
    scale_after(model.model.layers[9].input_layernorm, 1.001)


@breaks("KB304", **LLAMA)
def attention_scale_off_by_a_thousandth(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 1.001


@breaks("KB304", **LLAMA, quant="int8")
def gradient_of_one_head_dropped(model: Any) -> None:
    attention = model.model.layers[1].self_attn

    def without_first_head(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[..., : attention.head_dim] = 0
        return gradient

    change_input(attention.o_proj, lambda x: change_gradient(x, without_first_head))


class _Silu(torch.autograd.Function):
    """SiLU, whose backward takes the input as bfloat16 holds it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x.bfloat16())
        return torch.nn.functional.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        sigmoid = x.float().sigmoid()
        return (gradient * sigmoid * (1 + x * (1 - sigmoid))).to(gradient.dtype)


@breaks("KB304", **LLAMA)
def activation_kept_in_bfloat16(model: Any) -> None:
    """A kernel of one's own, an autograd function, in one block."""
    model.model.layers[1].mlp.act_fn.forward = _Silu.apply


@adds("KB304", model="tiny:llama")
def scales_the_gradient_between_two_blocks(model: Any) -> None:
    scale_after(blocks(model)[1], 1.001)


@breaks("KB304", **LLAMA)
def embedding_off_by_a_thousandth(model: Any) -> None:
    change_output(model.model.embed_tokens, lambda x: x * 1.001)


@breaks("KB304", **LLAMA)
def gradient_of_the_logits_off_by_a_thousandth(model: Any) -> None:
    scale_after(model.lm_head, 1.001)
