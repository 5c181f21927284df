"""What a prepared model is put into: several processes, trainers, a compiler, a copy, a run that is resumed."""

from typing import Literal, get_args

Composition = Literal["", "ddp", "fsdp2", "trainer", "sft", "compile", "copy", "resume", "trainer-resume", "accumulate"]
COMPOSITIONS: tuple[Composition, ...] = get_args(Composition)[1:]
