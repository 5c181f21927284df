"""Where the gradient of a batch goes: from the logits of each row and token to the blocks before them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from kbitcheck.core.facts import Cut, Teaching
from kbitcheck.models.inputs.text import IGNORED
from kbitcheck.observe import internals
from kbitcheck.observe.blockwise.record import outermost_blocks
from kbitcheck.observe.watch.contents import PADDING
from kbitcheck.observe.watch.guard import Guard

ENOUGH = 8  # tokens, below which chance could choose them
MOST = 0.9  # of the tokens that are learned
UNLEARNED = "ignored"


@dataclass(slots=True)
class Passage:
    """One forward and its backward, by row and token.

    ``size`` is the largest part of the gradient of the logits, ``target`` the token whose logit it raises most, by ``pull``. ``behind``
    says, for each block, which tokens have a gradient in what the block returns; ``last`` is the last block that ran.
    """

    tokens: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    size: Tensor | None = None
    target: Tensor | None = None
    pull: Tensor | None = None
    behind: dict[str, Tensor] = field(default_factory=dict)
    last: str = ""

    def logits(self, gradient: Tensor) -> None:
        """Keep what the gradient of the logits says of each token."""
        if gradient.dim() != 3:
            return
        gradient = internals.local(gradient.detach())
        lowest, self.target = gradient.min(dim=-1)
        self.pull = -lowest.float()
        self.size = torch.maximum(self.pull, gradient.amax(dim=-1).float())

    def block(self, name: str, gradient: Tensor) -> None:
        """Keep which tokens have a gradient behind a block."""
        reached = (internals.local(gradient.detach()) != 0).any(dim=-1)
        before = self.behind.get(name)
        self.behind[name] = reached if before is None else before | reached

    def taught(self, *, shifts: bool, scale: float) -> Teaching | None:
        """What the backward taught; None where no gradient of logits was seen. ``shifts``: the model predicts each next token."""
        size = self.size
        if size is None or self.target is None or self.pull is None or not bool(torch.isfinite(size).all()):
            return None
        some = size > 0
        if not bool(some.any()):
            return None
        strong = size >= size[some].median() / 2
        return Teaching(
            silent=self._silent(some),
            rows=len(size),
            cut=tuple(self._cuts(strong)),
            **self._targets(strong, shifts, scale),
        )

    def _silent(self, some: Tensor) -> int:
        """The rows without a gradient at the logits, though their labels count, or nobody passed labels."""
        silent = ~some.any(dim=1)
        if self.labels is not None and self.labels.shape == some.shape:
            silent &= (self.labels[:, 1:] != IGNORED).sum(dim=1) >= ENOUGH
        elif self.labels is not None:
            return 0
        return int(silent.sum())

    def _cuts(self, strong: Tensor) -> Iterator[Cut]:
        """Where what has a large gradient at the logits has none behind a block: rows, their last tokens, and behind the last block any token.

        Earlier tokens get one through those that attend to them, the last one past attention alone.
        """
        rows = strong.any(dim=1)
        final = strong & (strong.flip(1).cumsum(1).flip(1) == 1)
        for name, reached in self.behind.items():
            if reached.shape != strong.shape or not bool(reached.any()):
                continue
            checks = (
                ("rows", rows, rows & ~reached.any(dim=1)),
                ("tokens", strong, strong & ~reached if name == self.last else torch.zeros_like(strong)),
                ("last tokens", final, final & ~reached),
            )
            for what, of, lost in checks:
                if bool(lost.any()):
                    yield Cut(place=name, lost=int(lost.sum()), of=int(of.sum()), what=what)
                    break

    def _targets(self, strong: Tensor, shifts: bool, scale: float) -> dict[str, Any]:
        """What the tokens are pulled to: the next token, as is meant, or one that the model has read, the last or the one before it."""
        tokens, target, pull = self.tokens, self.target, self.pull
        assert target is not None
        assert pull is not None
        if not shifts or tokens is None or tokens.shape != target.shape or tokens.shape[1] < 2:
            return {}
        learned = strong & (pull > 0)
        following = learned[:, :-1] & (target[:, :-1] == tokens[:, 1:])
        preceding = learned[:, 1:] & (target[:, 1:] == tokens[:, :-1])
        count, ahead = int(learned.sum()), int(following.sum())
        own = max(int((learned & (target == tokens)).sum()), int(preceding.sum()))
        copied = count >= ENOUGH and own >= MOST * count and 2 * ahead < count
        odd = []
        if self.mask is not None and self.mask.shape == tokens.shape:
            padding = (self.mask[:, 1:] == 0) & (self.mask[:, :-1] == 0)  # the first may stand for the end of the text
            odd += [PADDING] * bool((following & padding).any())
        if self.labels is not None and self.labels.shape == tokens.shape:
            odd += [UNLEARNED] * (int((following & (self.labels[:, 1:] == IGNORED)).sum()) >= ENOUGH)
        weight = float(pull[:, :-1][following].sum()) / scale if ahead >= MOST * count else None
        return {"copied": copied, "odd": tuple(odd), "weight": weight}


class Flow:
    """Hooks on the blocks of a model and on the logits of its forwards; all of them only look."""

    def __init__(self, model: nn.Module, guard: Guard) -> None:
        self._blocks = {name: model.get_submodule(name) for name in outermost_blocks(model)}
        self._guard = guard
        self._forward: Passage | None = None  # the forward that runs
        self._backward: Passage | None = None  # the one that the backward came to last
        self._outputs: list[list[StorageWeakRef]] = [[]]  # of blocks, by step
        self.outliving = (0, 0)  # how many outputs are held two steps later, and of how many

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: a copy of the model, hooks among it, is not looked at."""
        return self

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The hooks, for a while."""
        with ExitStack() as hooks:
            for name, block in self._blocks.items():
                hooks.enter_context(block.register_forward_hook(self._guard(partial(self._returned, name))))
            yield

    def begin(self, inputs: Mapping[str, Any]) -> Passage:
        """A forward begins."""
        tokens, labels, mask = (_rows(inputs.get(name)) for name in ("input_ids", "labels", "attention_mask"))
        self._forward = passage = Passage(tokens, labels, mask)
        return passage

    def step_over(self) -> None:
        """A step is over: count what is held of the steps two or more before it."""
        if not self._outputs[-1]:
            return
        earlier = [each for outputs in self._outputs[:-2] for each in outputs]
        self.outliving = sum(not each.expired() for each in earlier), len(earlier)
        self._outputs.append([])

    def end(self, output: Any) -> None:
        """The forward ended."""
        passage, self._forward = self._forward, None
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if passage is not None and isinstance(logits, Tensor) and logits.requires_grad:
            logits.register_hook(self._guard(partial(self._comes, passage)))

    def _comes(self, passage: Passage, gradient: Tensor | None) -> None:
        self._backward = passage
        if gradient is not None:
            passage.logits(gradient)

    def _returned(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if module is not self._blocks[name]:
            return
        passage = self._backward if internals.backward_runs() else self._forward
        hidden = output[0] if isinstance(output, tuple) and output else output
        if passage is None or not isinstance(hidden, Tensor) or hidden.dim() != 3:
            return
        if passage is self._forward:
            passage.last = name
            self._outputs[-1].append(StorageWeakRef(internals.local(hidden).untyped_storage()))
        if hidden.requires_grad:
            hidden.register_hook(self._guard(partial(_behind, passage, name)))


def _behind(passage: Passage, name: str, gradient: Tensor | None) -> None:
    if gradient is not None:
        passage.block(name, gradient)


def _rows(tensor: Any) -> Tensor | None:
    return tensor.detach() if isinstance(tensor, Tensor) and tensor.dim() == 2 else None
