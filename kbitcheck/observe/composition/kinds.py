"""Each composition, by its name."""

from collections.abc import Mapping

from kbitcheck.observe.composition.parallel import InDDP, InFSDP2
from kbitcheck.observe.composition.resume import Resumed, ResumedTrainer
from kbitcheck.observe.composition.single import Compiled, Copies
from kbitcheck.observe.composition.steps import Alone, Run
from kbitcheck.observe.composition.trainers import Accumulating, InSFTTrainer, InTrainer

ALONE = "alone"
KINDS: Mapping[str, type[Run]] = {
    ALONE: Alone,
    "ddp": InDDP,
    "fsdp2": InFSDP2,
    "trainer": InTrainer,
    "sft": InSFTTrainer,
    "compile": Compiled,
    "copy": Copies,
    "resume": Resumed,
    "trainer-resume": ResumedTrainer,
    "accumulate": Accumulating,
}
