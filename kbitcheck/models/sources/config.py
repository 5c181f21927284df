"""Configurations without weights: a directory or a ``config.json``. Weights are drawn at random if the user says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.source import NO_WEIGHTS, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Config(Source):
    """A model of this configuration, with random weights; a static audit alone examines one that is not ``loadable``.

    ``foreign`` names the quantizer, without a backend here, that the weights were saved with; ``described`` is what the
    configuration says of their quantization, ``folder`` is where weights lie that are not read.
    """

    foreign: str = ""
    described: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def meta(self, quant: Quantization | None) -> PreTrainedModel:
        """The model on the meta device: with the packed tensors of its checkpoint, or as ``quant`` would quantize the original."""
        if quant is not None and self.leaves_aside(quant):
            return replace(self, config=_plain(self.config)).meta(quant)
        return super(Config, self).meta(quant)

    def leaves_aside(self, quant: Quantization) -> bool:
        """Whether ``quant`` is of the unquantized original, and not of the packed weights that are not run here."""
        own = Quantization.parse(self.quant) if self.quant else None
        return own is not None and bool(own.backend.static_only) and quant.scheme != own.scheme

    def load(self, quant: Quantization, device: str = "cpu") -> PreTrainedModel:
        """A fresh model, each tensor quantized on ``device`` as soon as it is drawn."""
        from kbitcheck.models import random_weights

        return random_weights.load(self.plan, quant, self._options(device))


def read(config: Mapping[str, Any], *, name: str, random_weights: bool, static: bool = False, **options: Any) -> Config:
    """The source for a configuration as read; ``static`` says that no weights are needed."""
    if static and not random_weights:
        method = foreign(config)
        own = _plain(config) if method else config
        described = _described(config)
        return Config(name=name, config=own, loadable=False, foreign=method, described=described, **options)
    if not random_weights:
        raise UsageError(NO_WEIGHTS.format(name=name))
    if config.get("auto_map"):
        raise UsageError(f"{name} needs code from its repository; --random-weights is for transformers' own classes")
    # Random weights are not quantized yet, even if the configuration says so of those it was written for.
    return Config(name=name, config=_plain(config), **options)


def unloadable(config: Mapping[str, Any]) -> bool:
    """Whether weights of this configuration were saved quantized in a way that is not loaded and run here."""
    described = _described(config)
    backend = registry.of_method(described) if described else None
    return bool(foreign(config) or (backend is not None and backend.static_only))


def foreign(config: Mapping[str, Any]) -> str:
    """The quantizer without a backend here that a configuration's weights were saved with; empty where none."""
    described = _described(config)
    backend = registry.of_method(described) if described else None
    if not described or (backend is not None and not backend.unavailable()):
        return ""
    return str(described.get("quant_method", "compressed-tensors"))


def _described(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # Compressed-tensors had a key of its own.
    return config.get("quantization_config") or config.get("compression_config") or {}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
