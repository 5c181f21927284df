"""What a preparation does with models of a quantization method, seen on a module of two numbers that is marked as one."""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kbitcheck.core.methods import Treatment
from kbitcheck.models import internals

# PEFT however it is named (peft, peft==0.13.2, peft:function, peft.utils:function), and no file peft.py.
PEFT = re.compile(r"peft(?![\w-]|\.py\b)")


class _Marked(nn.Module):
    """As much of a model as a preparation asks for: an unquantized half-precision parameter and the switches."""

    supports_gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.embedding = nn.Embedding(1, 2)
        self.gradient_checkpointing = self.checkpoints = False

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def enable_input_require_grads(self) -> None:
        """Nothing runs."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        self.checkpoints = True


def treatment(prepare: Callable[..., Any], config: Mapping[str, Any]) -> Treatment:
    """What ``prepare`` does with the parameters and checkpointing of a model with this ``quantization_config``."""
    model = _Marked()
    internals.mark_quantized(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(model)
    return Treatment(
        freezes=not any(parameter.requires_grad for parameter in model.parameters()),
        casts=model.norm.dtype == torch.float32,
        checkpoints=model.checkpoints,
    )


def peft_function() -> Callable[..., Any] | None:
    """PEFT's preparation; None where PEFT is not installed."""
    try:
        from peft import prepare_model_for_kbit_training
    except ImportError:
        return None
    prepare: Callable[..., Any] = prepare_model_for_kbit_training
    return prepare
