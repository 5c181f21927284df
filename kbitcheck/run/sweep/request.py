"""What a sweep runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kbitcheck.core.cases import Checkpointing, Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """The architectures of ``task`` that ``select`` and the part leave, and how each is audited.

    ``part`` counts from 1; ``timeout`` is in seconds for each architecture; rows are kept in ``output`` + ``.jsonl``,
    unless ``output`` is empty; ``command`` is the command that gives the same table again.
    """

    task: str
    select: Sequence[str]
    quant: str
    checkpointing: Checkpointing
    prepare: str
    profile: Profile
    device: str
    seed: int
    jobs: int
    timeout: float
    part: int
    parts: int
    output: str
    command: str
