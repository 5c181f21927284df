"""Architectures of transformers whose code differs."""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from kbitcheck.models.sources.architecture import CAUSAL_LM, listed


def distinct(task: str) -> Sequence[str]:
    """Model types of a task, one for each class.

    Of those whose head is transformers' own for all, and whose blocks a causal LM has as well, it is one in all.
    """
    kinds = {cls: kind for kind, cls in reversed(listed(task).items())}
    shared = [
        k for cls, k in kinds.items() if "forward" not in vars(getattr(transformers, cls)) and k in listed(CAUSAL_LM)
    ]
    return [kind for kind in kinds.values() if kind not in shared[1:]]
