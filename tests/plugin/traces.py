"""All that can change in a model, in what trains it, and in the process, as values that compare."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


def raw(item: Any) -> Any:
    """Everything that a value holds, by bytes for tensors and by identity for what is not plain."""
    if isinstance(item, torch.Tensor):
        held = item.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if item.numel() else b""
        state = raw(vars(item)) if vars(item) else None
        grad = raw(item.grad) if item.is_leaf and item.grad is not None else None
        return type(item), item.dtype, tuple(item.shape), item.requires_grad, item.data_ptr(), held, grad, state
    if isinstance(item, dict):
        return {str(k): raw(v) for k, v in item.items()}
    if isinstance(item, (list, tuple, set)):
        return [raw(v) for v in item]
    if item is None or isinstance(item, (bool, int, float, str, torch.dtype)):
        return item
    state = type(item).__module__.startswith("bitsandbytes") and not isinstance(item, torch.nn.Module)
    return id(item), raw(vars(item)) if state else None


def everything(model: Any, *others: Any) -> dict[str, Any]:
    """All that can change in a model, in what trains it, and in the process."""
    modules = {name: raw({k: v for k, v in vars(m).items() if k != "_modules"}) for name, m in model.named_modules()}
    return {
        "modules": modules,
        "names": [(name, id(m)) for name, m in model.named_modules()],
        "config": model.config.to_dict(),
        "others": raw(others),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr(numpy.random.get_state()),
        "random": random.getstate(),
        "modes": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
    }
