"""Configurations without weights: a directory or a ``config.json``. Weights are drawn at random if the user says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kbitcheck.core import UsageError
from kbitcheck.models.source import Source
from kbitcheck.quantization import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kbitcheck.models.drawing import Plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Config(Source):
    """A model of this configuration's size and kind, whose every tensor is drawn from the name of the tensor."""

    has_weights: ClassVar[bool] = False

    @property
    def checkpoint(self) -> Path:
        """The drawn, unquantized checkpoint; made once a process. ``load`` does without it."""
        from kbitcheck.models import drawing

        return drawing.checkpoint(self._plan)

    def load(self, quant: Quantization, device: str = "cpu") -> PreTrainedModel:
        """A fresh model, each tensor quantized on ``device`` as soon as it is drawn."""
        from kbitcheck.models import drawing

        return drawing.load(self._plan, quant, self._options(device))

    @property
    def _plan(self) -> Plan:
        from kbitcheck.models.drawing import Plan

        seed = str(self.config["model_type"])
        return Plan(name=self.name, seed=seed, config=self.config, dtype=self.unquantized_dtype)


def read(config: Mapping[str, Any], *, name: str, random_weights: bool, **options: Any) -> Config:
    """The source for a configuration as read.

    Raises:
        UsageError: the user did not ask for random weights, or they would need code from the model's repository.
    """
    if not random_weights:
        raise UsageError(f"{name} has no weights; give --random-weights to draw some")
    if config.get("auto_map"):
        raise UsageError(f"{name} needs code from its repository; --random-weights is for transformers' own classes")
    # Drawn weights are not quantized yet, whatever the configuration says of those it was written for.
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return Config(name=name, config=plain, **options)
