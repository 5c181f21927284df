"""What a prepared model is put into: several processes, trainers, a compiler, a copy, a run that is resumed."""

from collections.abc import Mapping
from typing import Literal, get_args

Composition = Literal["", "ddp", "fsdp2", "trainer", "sft", "compile", "copy", "resume", "trainer-resume", "accumulate"]
COMPOSITIONS: tuple[Composition, ...] = get_args(Composition)[1:]
# What frameworks say, and what it means.
MEANS: Mapping[str, str] = {
    "ready only once": "reentrant checkpointing under DDP: pass use_reentrant=False, or find_unused_parameters=False",
    "finished reduction": "parameters of the wrap got no gradient on this rank",
    "uniform original parameter dtype": "a unit of FSDP2 trains in two dtypes: KB702",
    "different metadata": "the recompute is not the forward: see KB403",
    "Connection closed by peer": "another process ended first",
    "does not require grad": "no gradient reaches the loss: see KB301",
}


def meaning_of(message: str) -> str:
    """What a framework's exception means for a prepared model; empty where nothing is known of it."""
    return next((means for words, means in MEANS.items() if words in message), "")
