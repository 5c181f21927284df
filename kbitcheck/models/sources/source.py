"""What every source of models offers. Importing this imports no torch; ``load``, ``reload`` and ``batch`` do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kbitcheck.backends.quantization import Quantization
from kbitcheck.backends.schemes import DTYPES, short_dtype
from kbitcheck.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kbitcheck.models.load import Options
    from kbitcheck.models.random_weights import Plan

NO_WEIGHTS = "{name} has no weights; give --random-weights to draw some"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """Where a model comes from. ``config`` is its ``config.json`` as read, ``dtype`` the one that the user requests.

    A source that is not ``loadable`` has no weights and draws none.
    """

    name: str
    config: Mapping[str, Any]
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    loadable: bool = True

    attention: ClassVar[str | None] = None

    @property
    def checkpoint(self) -> Path:
        """The directory that the model is loaded from; here an unquantized one of random weights, drawn once a process."""
        from kbitcheck.models import random_weights

        return random_weights.checkpoint(self.plan)

    @property
    def plan(self) -> Plan:
        """What random weights are drawn by; a source that has weights overrides ``checkpoint`` instead."""
        if not self.loadable:
            raise UsageError(NO_WEIGHTS.format(name=self.name))
        from kbitcheck.models.random_weights import Plan

        seed = str(self.config["model_type"])
        return Plan(name=self.name, seed=seed, config=self.config, dtype=self.unquantized_dtype)

    @property
    def unquantized_dtype(self) -> str:
        """Torch's name of the dtype that parameters outside quantized layers are loaded in."""
        return self.dtype or config_dtype(self.config) or "float32"

    @property
    def drawn(self) -> bool:
        """Whether the weights are drawn at random, and not somebody's, here or elsewhere."""
        return self.loadable

    @property
    def remote_code(self) -> bool:
        """Whether the model needs code from its repository."""
        return bool(self.config.get("auto_map"))

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the weights themselves, for the report."""
        return ()

    @property
    def quant(self) -> str | None:
        """The quantization the checkpoint already has, in the text form of ``Quantization``; None where it has none."""
        described = self.config.get("quantization_config")
        return None if described is None else str(Quantization.of_checkpoint(described))

    def load(self, quant: Quantization, device: str = "cpu") -> PreTrainedModel:
        """A fresh model, quantized on ``device``, in the mode ``from_pretrained`` leaves it in (eval)."""
        from kbitcheck.models import load as loading

        self._same_quantization(quant)
        model = loading.load(self.checkpoint, None if self.quant else self._complete(quant), self._options(device))
        return self.finished(model, () if self.quant else quant.skip)  # KB909 tells of a checkpoint's own list

    def load_unquantized(self) -> PreTrainedModel:
        """The model as its checkpoint has it, in its own dtype, on the CPU."""
        from kbitcheck.models import load as loading

        return self.finished(loading.load(self.checkpoint, None, self._options("cpu")))

    def meta(self, quant: Quantization | None) -> PreTrainedModel:
        """The model that ``load`` gives, on the meta device: no weights are read or made; with None before it is quantized."""
        from kbitcheck.models import meta

        if quant is None:
            return meta.build(self.config, None, self._options("cpu"), drawn=self.drawn)
        self._same_quantization(quant)
        own = Quantization.parse(self.quant) if self.quant else self._complete(quant)
        model = meta.build(self.config, own, self._options("cpu"), quantized=self.quant is not None, drawn=self.drawn)
        return self.finished(model, () if self.quant else quant.skip)  # KB909 tells of a checkpoint's own list

    def reload(self, folder: Path | str, device: str = "cpu") -> PreTrainedModel:
        """A quantized model of this kind as ``save_pretrained`` left it in ``folder``."""
        from kbitcheck.models import load as loading

        return self.finished(loading.load(Path(folder), None, self._options(device)))

    def batch(
        self, model: PreTrainedModel, *, batch: int | None = None, seq_len: int | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """A training batch for ``model``, on its device: see ``inputs.choose.training_batch``."""
        from kbitcheck.models.inputs.choose import training_batch
        from kbitcheck.models.inputs.text import ROWS, usual_length

        return training_batch(model, batch=batch or ROWS, seq_len=seq_len or usual_length(model), seed=seed)

    def _complete(self, quant: Quantization) -> Quantization:
        """``quant`` with the modules that the source itself leaves unquantized."""
        return quant

    def finished(self, model: PreTrainedModel, skip: tuple[str, ...] = ()) -> PreTrainedModel:
        """The model, once each name in ``skip`` is one of its modules."""
        names = [f".{name}." for name, _ in model.named_modules()]
        for skipped in skip:
            if not any(f".{skipped}." in name for name in names):
                raise UsageError(f"skip={skipped}: {self.name} has no module of this name")
        return model

    def _options(self, device: str) -> Options:
        from kbitcheck.models.load import Options

        return Options(
            name=self.name,
            device=device,
            dtype=self.unquantized_dtype,
            attention=self.attention,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
        )

    def _same_quantization(self, quant: Quantization) -> None:
        if self.quant is None:
            return
        own = Quantization.parse(self.quant)
        if replace(own, skip=()) != replace(quant, skip=()) or not set(quant.skip) <= set(own.skip):
            raise UsageError(f"{self.name} is already quantized as {own}, which {quant} is not: leave --quant out")


def config_dtype(config: Mapping[str, Any]) -> str | None:
    """Torch's name of the dtype that a ``config.json`` states, for its text model if only there; None if nowhere."""
    for part in (config, config.get("text_config") or {}):
        stated = part.get("dtype") or part.get("torch_dtype")
        if isinstance(stated, str):
            return stated.removeprefix("torch.")
    return None


def requested_dtype(text: str | None) -> str | None:
    """Torch's name of the dtype that ``--dtype`` requests."""
    if text is None:
        return None
    short = short_dtype(text)
    if short is None or short == "uint8":
        raise UsageError(f"unknown dtype {text!r}; use bf16, fp16, fp32")
    return DTYPES[short]
