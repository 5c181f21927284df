"""Losses that never hold all logits: what they keep and allocate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name)
from torch import Tensor, nn

from kbitcheck.core.errors import UsageError
from kbitcheck.observe import internals
from kbitcheck.observe.probes import switches

CHUNK = 512  # tokens


class ChunkedLoss(torch.autograd.Function):
    """Head and cross-entropy over chunks of tokens, each recomputed in the backward. Keeps the hidden states.

    One chunk stands for all: each is freed before the next.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Module) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.head = head
        ctx.autocast = {"dtype": torch.get_autocast_dtype("cpu"), "enabled": torch.is_autocast_enabled("cpu")}
        return _cross_entropy(head, hidden[:CHUNK])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        gradient = torch.empty_like(hidden)
        chunk = hidden.detach()[:CHUNK].requires_grad_()
        with torch.enable_grad(), torch.autocast("cpu", **ctx.autocast):
            loss = _cross_entropy(ctx.head, chunk)
        torch.autograd.grad(loss, chunk)
        return gradient, None


class FusedLoss(torch.autograd.Function):
    """Liger's fused linear cross-entropy: the forward makes the hidden states' gradient, chunk by chunk, and keeps it.

    Chunks hold as many logits as the hidden states have numbers, and become their own gradient in place.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Any) -> Tensor:
        gradient = torch.zeros_like(hidden)
        losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
        logits = head(hidden[: fused_chunk(head, len(hidden))])
        F.linear(logits, head.weight.t())
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


def fused_chunk(head: Any, tokens: int) -> int:
    """Tokens in a chunk of Liger's fused linear cross-entropy."""
    weight: Tensor = head.weight
    vocabulary, width = weight.shape
    least = -(-tokens // -(-vocabulary // width))
    return min(tokens, 1 << (least - 1).bit_length())


LOSSES = {"chunked": ChunkedLoss, "fused": FusedLoss}


class Headless:
    """A causal language model whose ``loss`` is computed from its hidden states; ``logits`` are the bytes of a chunk's."""

    def __init__(self, model: Any, loss: str) -> None:
        self._model, self._loss = model, LOSSES[loss]
        self._head = model.get_output_embeddings()
        self._ran = False
        self.logits = 0
        name = next((n for n, m in model.named_modules() if m is self._head), "")
        if not name or not hasattr(model, "loss_function"):
            raise UsageError(f"--loss {loss}: {type(model).__name__} has no head and loss of transformers' usual form")
        self._parent, self._child = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While entered, the head hands on the hidden states, and the loss takes them."""
        text = self._model.config.get_text_config()
        capped = [(text, "final_logit_softcapping", None)] if hasattr(text, "final_logit_softcapping") else []
        internals.replace_child(self._parent, self._child, nn.Identity())
        try:
            with switches.attributes((self._model, "loss_function", self._compute), *capped):
                yield
        except RuntimeError:
            if self._ran:
                raise
        finally:
            internals.replace_child(self._parent, self._child, self._head)
        if not self._ran:
            raise UsageError(f"--loss full: {type(self._model).__name__} computes its loss itself")

    def _compute(self, logits: Tensor, labels: Tensor, **_: Any) -> Any:
        """The loss of hidden states, which come as ``logits``."""
        self._ran = True
        hidden = logits.flatten(0, -2)
        chunk = fused_chunk(self._head, len(hidden)) if self._loss is FusedLoss else min(CHUNK, len(hidden))
        self.logits = 4 * chunk * self._head.weight.shape[0]
        return self._loss.apply(hidden, self._head)


def _cross_entropy(head: nn.Module, hidden: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), torch.zeros(len(hidden), dtype=torch.int64))
