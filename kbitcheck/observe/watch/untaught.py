"""Which trained tensors of a block a batch has nothing to teach."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from kbitcheck.core.facts import Gap, vanishing
from kbitcheck.observe.blockwise.oracle import compare_alone
from kbitcheck.observe.blockwise.record import floating
from kbitcheck.observe.watch.blocks import Recorder, Twins, around


def untaught(recorder: Recorder, pairs: Twins, gaps: Mapping[str, Gap]) -> frozenset[str]:
    """Names of tensors whose gradient is zero, in twins too, and for which the tokens and labels are the reason.

    They get a gradient if one enters at every token. What then has none either, as two factors that are both zero, is left out, unless
    rows have one token: there is nothing to attend to.
    """
    zero, recorded = vanishing(gaps), recorder.recorded
    if not zero or recorded is None or len(zero) == len(gaps):  # a batch that teaches a block nothing is no excuse
        return frozenset()
    call = recorded.call
    tokens = [leaf.shape[1] for leaf in call.leaves[:1] if floating(leaf) and leaf.dim() == 3]
    if tokens == [1]:
        return zero
    draws = torch.Generator().manual_seed(0)
    entering, choices = call.entering, call.choices
    like = {i: call.outputs[i] for i in entering}
    call.entering = {i: torch.randn(o.shape, generator=draws).to(o) for i, o in like.items()}
    none = {n: torch.zeros_like(p) for n, p in recorder.block.named_parameters() if n in gaps}
    pair, woken = pairs.of(recorder.name, recorder.block), frozenset[str]()
    try:
        for _ in range(2):  # what a gradient moves first, as a ``lora_B`` that is zero, passes one on to its ``lora_A``
            _, others = compare_alone(call, {**none}, pair, partial(around, recorded))
            call.choices = choices
            woken = zero - vanishing(others)
            for name in woken:
                moved = torch.randn(none[name].shape, generator=draws)
                for twin in pair:
                    twin.adapters[name].data.copy_(moved)
    finally:
        call.entering, call.choices = entering, choices
    return woken
