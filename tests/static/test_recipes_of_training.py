"""Forecast steps as people train: kinds of attention, packed sequences, losses without logits."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.recipe import Recipe
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.forecast import losses, predict
from kbitcheck.observe.probes.live import Live
from kbitcheck.observe.probes.snapshot import snapshot

BATCH, LENGTH, VOCABULARY = 4, 256, 3000


def training(model="tiny:llama", **options):
    source = resolve(model)
    if isinstance(source, Recipe) and model == "tiny:llama":  # heads that kernels take, and many logits
        source = dataclasses.replace(
            source, unread={}, config={**source.config, "head_dim": 16, "vocab_size": VOCABULARY}
        )
    spec = CaseSpec(model=model, quant="nf4", implementation="none", device="auto", **options)
    meta = source.meta(Quantization.parse("nf4"))
    return predict.Training(source, meta, snapshot(meta), spec, predict.runtime_of(spec, "cuda"))


def step(**options):
    return training(**options).step(BATCH, LENGTH, "off")


def test_eager_attention_keeps_scores_and_flash_attention_2_does_not():
    kinds = {kind: step(attention=kind) for kind in ("eager", "sdpa", "flash_attention_2")}
    assert {kind: next(iter(s.attention)) for kind, s in kinds.items()} == {
        "eager": "eager",
        "sdpa": "memory-efficient (a mask)",
        "flash_attention_2": "flash_attention_2",
    }
    held = {kind: s.held for kind, s in kinds.items()}
    scores = 4 * BATCH * LENGTH**2  # of one head, in float32
    assert held["flash_attention_2"] < held["sdpa"] < held["eager"] - scores


def test_attention_that_is_not_there_is_wrong_usage():
    with pytest.raises(UsageError, match="T5ForConditionalGeneration does not support it"):
        training("tiny:t5", attention="flash_attention_2")
    with pytest.raises(UsageError, match="Ampere"):
        training(attention="flash_attention_2", gpu="T4")


def test_packed_sequences_are_one_row():
    """With torch's attention they need a mask of all tokens, with flash attention none."""
    attention = {kind: step(packed=True, attention=kind) for kind in ("sdpa", "flash_attention_2")}
    assert next(iter(attention["sdpa"].attention)) == "memory-efficient (a mask)"
    assert attention["sdpa"].held - attention["flash_attention_2"].held > (BATCH * LENGTH) ** 2
    alone = training(packed=True, attention="sdpa").step(1, LENGTH, "off")
    assert next(iter(alone.attention)) == "flash"
    with pytest.raises(UsageError, match="--packed"):
        training("tiny:t5", packed=True).step(2, 8, "off")


def test_losses_without_logits_hold_less():
    kinds = ("full", "chunked", "fused")
    steps = {loss: training(loss=loss, attention="sdpa").step(BATCH, LENGTH, "reentrant") for loss in kinds}
    assert steps["full"].logits > steps["chunked"].logits > 0 < steps["fused"].logits
    assert steps["chunked"].held == steps["fused"].held  # hidden states, or their gradient
    assert steps["full"].held - steps["fused"].held > steps["full"].logits / 2
    assert max(steps["chunked"].peak, steps["fused"].peak) < steps["full"].peak
    with pytest.raises(UsageError, match="T5ForConditionalGeneration computes its loss itself"):
        training("tiny:t5", loss="fused").step(2, 8, "off")


def test_the_head_is_back_after_a_step():
    run = training(loss="fused")
    run.step(1, 8, "off")
    runtime = dataclasses.replace(run.runtime, loss="full")
    assert run.step(1, 8, "off", runtime=runtime).logits == 4 * 8 * VOCABULARY


def chunk_by_chunk(hidden, head):
    """What ``ChunkedLoss`` stands for."""

    def loss(part):
        return F.cross_entropy(head(part), torch.zeros(len(part), dtype=torch.int64), reduction="sum")

    return sum(
        checkpoint(loss, part, use_reentrant=False, preserve_rng_state=False) for part in hidden.split(losses.CHUNK)
    )


def test_chunks_hold_what_real_ones_hold():
    peaks = []
    for compute in (chunk_by_chunk, losses.ChunkedLoss.apply):
        head = nn.Linear(32, 1000, bias=False).requires_grad_(False)
        hidden = torch.randn(4 * losses.CHUNK, 32, requires_grad=True)
        live = Live([hidden, head.weight])
        floor = live.now
        with live:
            compute(hidden, head).backward()
        peaks.append(live.peak - floor)
    real, stand_in = peaks
    assert abs(stand_in - real) <= 2 * hidden.nbytes  # gradients of chunks, and what they are joined to


@pytest.mark.parametrize(("tokens", "expected"), [(2048, 64), (8192, 256), (10, 1), (1, 1)])
def test_fused_chunks_are_those_of_liger(tokens, expected):
    assert losses.fused_chunk(nn.Linear(4096, 128256, bias=False, device="meta"), tokens) == expected
