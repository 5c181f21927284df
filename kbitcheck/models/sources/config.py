"""Configurations without weights: a directory or a ``config.json``. Weights are drawn at random if the user says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kbitcheck.models.random_weights import Plan

NO_WEIGHTS = "{name} has no weights; give --random-weights to draw some"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Config(Source):
    """A model of this configuration's size and kind, whose every tensor is drawn from the name of the tensor.

    Where ``drawn`` is False it has no tensors at all, and only its static facts can be told; ``foreign`` then names the
    quantizer, without a backend here, that its weights were saved with.
    """

    drawn: bool = True
    foreign: str = ""

    @property
    def checkpoint(self) -> Path:
        """The drawn, unquantized checkpoint; made once a process. ``load`` does without it.

        Raises:
            UsageError: nothing was to be drawn.
        """
        from kbitcheck.models import random_weights as drawing

        return drawing.checkpoint(self._plan)

    def load(self, quant: Quantization, device: str = "cpu") -> PreTrainedModel:
        """A fresh model, each tensor quantized on ``device`` as soon as it is drawn.

        Raises:
            UsageError: nothing was to be drawn.
        """
        from kbitcheck.models import random_weights as drawing

        return drawing.load(self._plan, quant, self._options(device))

    @property
    def _plan(self) -> Plan:
        from kbitcheck.models.random_weights import Plan

        if not self.drawn:
            raise UsageError(NO_WEIGHTS.format(name=self.name))
        seed = str(self.config["model_type"])
        return Plan(name=self.name, seed=seed, config=self.config, dtype=self.unquantized_dtype)


def read(config: Mapping[str, Any], *, name: str, random_weights: bool, static: bool = False, **options: Any) -> Config:
    """The source for a configuration as read; ``static`` says that it will do without weights.

    Raises:
        UsageError: the user did not ask for random weights, or they would need code from the model's repository.
    """
    if static and not random_weights:
        method = foreign(config)
        own = _plain(config) if method else config
        return Config(name=name, config=own, drawn=False, foreign=method, **options)
    if not random_weights:
        raise UsageError(NO_WEIGHTS.format(name=name))
    if config.get("auto_map"):
        raise UsageError(f"{name} needs code from its repository; --random-weights is for transformers' own classes")
    # Drawn weights are not quantized yet, whatever the configuration says of those it was written for.
    return Config(name=name, config=_plain(config), **options)


def foreign(config: Mapping[str, Any]) -> str:
    """The quantizer without a backend here that a configuration's weights were saved with; empty where none."""
    # Compressed-tensors had a key of its own.
    described = config.get("quantization_config") or config.get("compression_config")
    if not described or registry.of_method(described):
        return ""
    return str(described.get("quant_method", "compressed-tensors"))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
