"""What a user may do to a prepared model between two training steps, as plain data: a program is a list of step names."""

from __future__ import annotations

from typing import Literal, get_args

Step = Literal[
    "train", "accumulate", "update",
    "evaluate", "infer", "generate",
    "prepare", "reattach", "save",
    "checkpointing-off", "checkpointing-reentrant", "checkpointing-non-reentrant",
    "train-mode", "eval-mode", "autocast-on", "autocast-off",
    "batch-one", "batch-whole", "copy", "move",
]  # fmt: skip
STEPS: tuple[Step, ...] = get_args(Step)

# What KB308 runs in each case; any other program is for the state machine and for replays.
INTERLEAVED: tuple[Step, ...] = (
    "train", "evaluate", "infer", "generate", "eval-mode", "copy", "train", "prepare", "save", "update", "accumulate",
    "checkpointing-off", "evaluate", "move", "checkpointing-non-reentrant", "train",
)  # fmt: skip
