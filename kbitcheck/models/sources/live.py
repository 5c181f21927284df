"""A quantized model that the caller already has."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LiveModel:
    """Stands for a live model. ``load`` copies it, so that the caller's own is never prepared or run."""

    model: Any

    @property
    def name(self) -> str:
        """Where the model says it came from, or its class."""
        config = getattr(self.model, "config", None)
        return str(getattr(config, "name_or_path", "") or type(self.model).__name__)

    @property
    def quant(self) -> str:
        """The text form of the model's own quantization.

        Raises:
            UsageError: no layer of it is quantized.
        """
        from kbitcheck import backends

        kinds = sorted({backends.recognition(m).scheme(m) for _, m in backends.quantized_layers(self.model)})
        if not kinds:
            raise UsageError(f"{self.name} has no quantized layer: load it with a quantization_config first")
        return str(kinds[0])

    @property
    def remote_code(self) -> bool:
        """Whether its code comes from a repository."""
        return bool(getattr(getattr(self.model, "config", None), "auto_map", None))

    def load(self, quant: Quantization, device: str) -> Any:
        """A copy of the model, wherever it is; ``quant`` and ``device`` are its own."""
        from kbitcheck import backends

        return backends.steady(copy.deepcopy(self.model))

    def reload(self, folder: Path | str, device: str = "cpu") -> Any:
        """The model that ``save_pretrained`` saved in ``folder``."""
        from kbitcheck.models import load as loading

        dtype = str(getattr(self.model, "dtype", "auto")).removeprefix("torch.")
        return loading.load(Path(folder), None, loading.Options(name=self.name, device=device, dtype=dtype))

    def batch(
        self, model: Any, *, batch: int | None = None, seq_len: int | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """A training batch for the model: see ``inputs.choose.training_batch``."""
        from kbitcheck.models.inputs.choose import training_batch

        return training_batch(model, batch=batch or 2, seq_len=seq_len or 24, seed=seed)
