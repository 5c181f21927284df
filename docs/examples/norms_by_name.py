"""A preparation with a defect of PEFT's first release: it looks for norms by name, and Llama's norms have other names."""

import torch


def prepare(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
    """Freeze, upcast the norms, checkpoint."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = False
        if "layer_norm" in name and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if use_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
    return model
