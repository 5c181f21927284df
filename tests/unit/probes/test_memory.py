"""Bytes that a step holds, block by block, where autocast keeps copies of weights."""

import torch
from peft import get_peft_model

from kbitcheck.core.facts import MemoryFacts
from kbitcheck.models.blocks import is_block
from kbitcheck.observe.probes.live import Live
from kbitcheck.observe.probes.memory import activations
from tests.watch import runs


def measured(*, left_out: int | None = None) -> MemoryFacts:
    """A step under autocast of a model whose adapters are in float32; ``left_out`` is a block that does not checkpoint."""
    model = get_peft_model(runs.load(layers=3), runs.lora())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    blocks = [m for m in model.modules() if is_block(m)]
    if left_out is not None:
        blocks[left_out].gradient_checkpointing = False
    (batch,) = runs.batches(1)
    return activations(model, batch, seed=0, autocast=lambda: torch.autocast("cpu", torch.bfloat16))


def over(facts: MemoryFacts) -> list[bool]:
    """Of each block that another one follows, whether it adds more than it may."""
    return [size > facts.step_allowed[name] for name, size in facts.steps.items()][:-1]


def test_copies_of_weights_that_autocast_keeps_are_no_activations_of_a_block() -> None:
    assert over(measured()) == [False, False]


def test_a_block_that_does_not_checkpoint_is_seen_under_autocast() -> None:
    assert over(measured(left_out=1)) == [False, True]


def test_what_an_operator_reads_was_there_before() -> None:
    """A module may keep a tensor in a plain attribute, and take views of it, as FourierFT does with its indices."""
    held = torch.arange(64)
    with Live() as live:
        view = held[:32]
        assert live.now == 0
        copy = view + 1
        assert live.now == copy.untyped_storage().nbytes()


def test_a_sparse_tensor_has_the_bytes_of_its_indices_and_values() -> None:
    dense = torch.eye(4)
    with Live() as live:
        sparse = dense.to_sparse()
        assert live.now == 2 * 4 * 8 + 4 * 4
    assert sparse.is_sparse
