"""A batch for a model of transformers inside whatever wraps it."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kbitcheck.core.errors import UsageError
from kbitcheck.models.inputs.choose import first_running, training_batch
from kbitcheck.models.inputs.text import Batch


def batch_inside(model: nn.Module, **shape: int) -> Batch:
    """A batch for the model of transformers that is inside whatever wraps it, of what the wrapper's forward takes.

    Tokens that train by themselves are in it.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        raise UsageError(f"{type(model).__name__} holds no model of transformers: give batch=")
    try:
        made = training_batch(inner, **shape)
    except UsageError as error:  # also of a model that computes no loss by itself
        running = first_running(inner, **shape)
        if running is None:
            raise UsageError(f"{error}: give batch=") from None
        made = running
    parameters = inspect.signature(type(model).forward).parameters.values()
    taken = {p.name for p in parameters}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return _with_tokens(_trained_tokens(model), {k: v for k, v in made.items() if anything or k in taken})


def _trained_tokens(model: nn.Module) -> list[int]:
    """Indices of the tokens whose embeddings alone train: PEFT's ``trainable_token_indices``."""
    by_adapter: list[Any] = [getattr(m, "token_indices", None) for m in model.modules()]
    dictionaries = [indices for indices in by_adapter if isinstance(indices, dict)]
    return sorted({int(index) for indices in dictionaries for each in indices.values() for index in each})


def _with_tokens(tokens: Sequence[int], batch: Batch) -> Batch:
    """The batch with tokens in the first row, spread over it, as inputs and as labels."""
    ids = batch.get("input_ids")
    if not tokens or ids is None or ids.dim() != 2:
        return batch
    shown = torch.tensor(tokens[: ids.shape[1] // 2], device=ids.device)
    changed = {k: v.clone() for k, v in batch.items() if k in ("input_ids", "labels") and v.shape == ids.shape}
    for tensor in changed.values():
        tensor[0, 1 : 2 * len(shown) : 2] = shown
    return {**batch, **changed}
