"""What is odd about a batch, though a loss comes of it: padding that counts or is attended to, ends that never count, one position,
labels of other rows or that a decoder has read, dropout that drops the same again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kbitcheck.models.inputs.text import IGNORED

PADDING, ENDS, POSITIONS, OTHERS, UNMASKED = "padding", "ends", "positions", "others", "unmasked"
READ = "read"
ENOUGH = 8  # labels, to say what most of them are


def oddities(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of what is odd about a model's inputs, of ``PADDING``, ``ENDS``, ``POSITIONS``, ``UNMASKED`` and ``READ``."""
    return tuple(_kinds(getattr(model, "config", None), inputs))


def labels_of_others(inputs: Mapping[str, Any]) -> bool:
    """Whether most labels that count are neither the token in their place nor the one after it, as if rows were mixed up."""
    tokens, labels = (_rows(inputs.get(name)) for name in ("input_ids", "labels"))
    if tokens is None or labels is None or tokens.shape != labels.shape:
        return False
    counts, own = labels != IGNORED, labels == tokens
    own[:, :-1] |= labels[:, :-1] == tokens[:, 1:]
    return int(counts.sum()) >= ENOUGH and 2 * int((own & counts).sum()) < int(counts.sum())


def drops(model: nn.Module) -> bool:
    """Whether a dropout of the model is on."""
    return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in model.modules())


def _kinds(config: Any, inputs: Mapping[str, Any]) -> Iterator[str]:
    tokens, labels, mask = (_rows(inputs.get(name)) for name in ("input_ids", "labels", "attention_mask"))
    if getattr(config, "is_encoder_decoder", False):
        if labels is not None and _reads_labels(_rows(inputs.get("decoder_input_ids")), labels):
            yield READ
        return
    if tokens is None:
        return
    if labels is not None and labels.shape == tokens.shape:
        counts = labels != IGNORED
        if mask is not None and mask.shape == tokens.shape and bool((counts & (mask == 0))[:, 1:].any()):
            yield PADDING
        if _ends_never_count(tokens, counts, mask, _end_tokens(config)):
            yield ENDS
    if _begins_with_padding(tokens, labels, inputs.get("attention_mask"), _padding_tokens(config)):
        yield UNMASKED
    positions = _rows(inputs.get("position_ids"))
    if positions is not None and positions.shape == tokens.shape and tokens.shape[1] > 1:
        seen = torch.ones_like(tokens) if mask is None or mask.shape != tokens.shape else mask
        first = positions[:, :1].expand_as(positions)
        if bool((((positions == first) | (seen == 0)).all(dim=1) & (seen.sum(dim=1) > 1)).any()):
            yield POSITIONS


def _reads_labels(read: Tensor | None, labels: Tensor) -> bool:
    """Whether a decoder is passed each label that counts in its own place, and not one token later."""
    if read is None or read.shape != labels.shape:
        return False
    counts = labels != IGNORED
    later = (read[:, 1:] == labels[:, :-1]) | ~counts[:, :-1]
    return int(counts.sum()) >= ENOUGH and bool(((read == labels) | ~counts).all()) and not bool(later.all())


def _begins_with_padding(tokens: Tensor, labels: Tensor | None, mask: Any, padding: set[int]) -> bool:
    """Whether a row begins with padding, two tokens of it at least, that the other tokens attend to, and that teaches nothing."""
    if not padding or (mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape)):
        return False
    leading = torch.isin(tokens, torch.tensor(sorted(padding), device=tokens.device)).cumprod(dim=1).bool()
    seen = leading if mask is None else leading & (mask != 0)
    if labels is not None and labels.shape == tokens.shape:
        seen &= (labels == IGNORED) | (labels == tokens)
    return bool(((seen.sum(dim=1) > 1) & ~leading.all(dim=1)).any())


def _padding_tokens(config: Any) -> set[int]:
    """The padding token; where a model has none, texts are padded with what ends them."""
    padding = getattr(config, "pad_token_id", None)
    return {padding} if isinstance(padding, int) else _end_tokens(config)


def _ends_never_count(tokens: Tensor, counts: Tensor, mask: Tensor | None, ends: set[int]) -> bool:
    """Whether no token that ends a text is learned, though one of them ends a text that is: the label before it counts."""
    if not ends or not counts.any():
        return False
    is_end = torch.isin(tokens, torch.tensor(sorted(ends), device=tokens.device))
    attended = is_end if mask is None or mask.shape != tokens.shape else is_end & (mask != 0)
    return bool((attended[:, 1:] & counts[:, :-1]).any()) and not bool((is_end & counts).any())


def _end_tokens(config: Any) -> set[int]:
    """The tokens that end a text."""
    ends = getattr(config, "eos_token_id", None)
    return {end for end in (ends if isinstance(ends, list | tuple) else [ends]) if isinstance(end, int)}


def _rows(tensor: Any) -> Tensor | None:
    return tensor.detach() if isinstance(tensor, Tensor) and tensor.dim() == 2 else None
