"""The recipe of dtypes that a model follows."""

from dataclasses import dataclass

from kbitcheck.core.cases import Freezes, Profile

CAST = {"peft": "everything upcast", "qlora": "norms upcast", "frozen-half": "nothing upcast"}
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
# Who prepares models so, by profile and dtype of the adapters: measured on their default settings.
TRAINERS = {
    ("peft", "float32"): "PEFT",
    ("peft", ""): "PEFT",
    ("frozen-half", "bfloat16"): "TRL",
    ("peft", "bfloat16"): "TRL",  # its command loads in float32
    ("frozen-half", "float32"): "LLaMA-Factory, axolotl or ms-swift",
    ("qlora", "float32"): "QLoRA",
}
# Default learning rates: TRL's SFTTrainer has its own, LLaMA-Factory has that of transformers' Trainer.
RATES = {"TRL": 2e-5}
TRAINER_RATE = 5e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The recipe that a model's dtypes follow, under the name of the profile that promises it.

    ``adapters`` is their dtype (empty: none attached yet). ``mixed`` is True if the dtypes follow no single recipe, and
    ``profile`` is then the closest one. ``towers_differ`` is True if norms are upcast in some towers alone.
    """

    profile: Profile
    freezes: Freezes
    adapters: str = ""
    autocast: bool = False
    mixed: bool = False
    towers_differ: bool = False

    @property
    def trainer(self) -> str:
        """Who prepares models so; empty where no trainer does."""
        return TRAINERS.get((self.profile, self.adapters), "")

    def __str__(self) -> str:
        """``dtypes as TRL prepares them: nothing upcast, adapters bf16, autocast``."""
        trainer = self.trainer
        start = f"dtypes as {trainer} prepares them" if trainer else "dtypes"
        cast = CAST[self.profile]
        if self.towers_differ:
            start, cast = "dtypes", "norms upcast in some towers"
        if self.mixed:
            start, cast = "dtypes of no single recipe", f"closest to {self.profile}"
        adapters = f"adapters {SHORT.get(self.adapters, self.adapters)}" if self.adapters else ""
        return f"{start}: " + ", ".join(filter(None, (cast, adapters, "autocast" if self.autocast else "")))


def default_rate(recipe: Recipe | None) -> float:
    """The default learning rate of the trainer that prepares models so, or of transformers' Trainer."""
    return RATES.get(recipe.trainer, TRAINER_RATE) if recipe else TRAINER_RATE
