"""Bytes that a step holds, block by block, where autocast keeps copies of weights."""

import torch
from peft import get_peft_model

from kbitcheck.core.facts import MemoryFacts
from kbitcheck.models.blocks import is_block
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
