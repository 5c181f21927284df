"""What other projects do instead of calling PEFT's function, rebuilt from descriptions of their behaviour.

Each has the signature that kbitcheck calls; what is no drop-in is adapted inside (it runs after adapters are attached,
returns nothing, or takes other arguments).
"""

from __future__ import annotations

from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)


def switch_on(model: Any, kwargs: dict[str, Any]) -> None:
    """Checkpointing in every block, under the name that the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs)


def hook_inputs(model: Any) -> None:
    """Inputs require grad; transformers may have seen to it already."""
    if not getattr(model, "_require_grads_hooks", None):
        model.enable_input_require_grads()


def freeze(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = False


def is_packed(parameter: Any) -> bool:
    return hasattr(parameter, "quant_state") or hasattr(parameter, "SCB")


def trl_trainer(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
    """TRL's trainers: no preparation; the adapter library freezes, nothing is cast, checkpointing is not reentrant."""
    if use_gradient_checkpointing:
        switch_on(model, {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
        hook_inputs(model)
    return model


def trl_experimental(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
    """TRL's own copy: freezes, casts nothing, always hooks inputs."""
    freeze(model)
    return trl_trainer(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


def trl_experimental_bf16(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
    """With ``bf16`` and a 4-bit model every parameter that is still float32 becomes bfloat16, whatever it holds."""
    trl_experimental(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def unsloth(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
    """Runs on a model with adapters, goes by their names, takes ``use_reentrant`` and no other argument."""
    reentrant = (gradient_checkpointing_kwargs or {}).get("use_reentrant", True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in (".lora_A", ".lora_B", ".lora_magnitude_vector")))
    if use_gradient_checkpointing:
        switch_on(model, {"use_reentrant": reentrant})
        if reentrant:
            hook_inputs(model)
    return model


def llama_factory(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None, *, upcast=False):
    """Freezing is the adapter library's; norms are cast on request, by name and number of dimensions."""
    if upcast:
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and any(part in name for part in ("norm", "ln")):
                parameter.data = parameter.data.to(torch.float32)
    if use_gradient_checkpointing:
        switch_on(model, {"use_reentrant": True, **(gradient_checkpointing_kwargs or {})})
        hook_inputs(model)
    return model


def llama_factory_upcasting(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
    """The same with ``upcast_layernorm``."""
    return llama_factory(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, upcast=True)


def peft_like(model: Any, use_gradient_checkpointing: bool) -> None:
    """What PEFT's function does to a bitsandbytes model when it is given no checkpointing arguments."""
    freeze(model)
    for parameter in model.parameters():
        if parameter.dtype in HALF and not is_packed(parameter):
            parameter.data = parameter.data.to(torch.float32)
    if use_gradient_checkpointing:
        switch_on(model, {})
        hook_inputs(model)


def axolotl(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
    """Switches on with the arguments, prepares without them, then casts norms and embeddings back to the model's dtype."""
    if use_gradient_checkpointing:
        switch_on(model, gradient_checkpointing_kwargs or {"use_reentrant": True})
    dtype = next(p.dtype for n, p in model.named_parameters() if "norm" in n)
    peft_like(model, use_gradient_checkpointing)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("norm", "embed_tokens", "lm_head")) and not is_packed(parameter):
            parameter.data = parameter.data.to(dtype)
    return model


def qlora(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
    """PEFT's function with a mode named, then norms in float32, embeddings and head back in bfloat16."""
    peft_like(model, False)
    if use_gradient_checkpointing:
        switch_on(model, {"use_reentrant": True, **(gradient_checkpointing_kwargs or {})})
        hook_inputs(model)
    for name, module in model.named_modules():
        if "norm" in name:
            module.to(torch.float32)
        elif ("lm_head" in name or "embed_tokens" in name) and module.weight.dtype == torch.float32:
            module.to(torch.bfloat16)
    return model
