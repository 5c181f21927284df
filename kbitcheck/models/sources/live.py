"""A quantized model that the caller already has."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.source import Source


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LiveModel(Source):
    """Stands for a live model. ``load`` copies it, so that the caller's own is never prepared or run."""

    model: Any

    @classmethod
    def of(cls, model: Any) -> Self:
        """The source of a model, by the name of where it says that it came from, or of its class."""
        config = getattr(model, "config", None)
        return cls(
            name=str(getattr(config, "name_or_path", "") or type(model).__name__),
            config={"auto_map": getattr(config, "auto_map", None)},
            dtype=next(
                (str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()), "auto"
            ),
            model=model,
        )

    @property
    def quant(self) -> str:
        """The text form of the model's own quantization."""
        from kbitcheck import backends

        kinds = sorted({backends.recognition(m).scheme(m) for _, m in backends.holders(self.model)})
        kinds = kinds or sorted(backends.emptied_schemes(self.model))
        if not kinds:
            raise UsageError(f"{self.name} has no quantized layer: load it with a quantization_config first")
        return str(kinds[0])

    def batch(
        self, model: Any, *, batch: int | None = None, seq_len: int | None = None, seed: int = 0
    ) -> dict[str, Any]:
        """A training batch for the model of transformers inside ``model``: see ``inputs.wrapped.batch_inside``."""
        from kbitcheck.models.inputs.text import ROWS, usual_length
        from kbitcheck.models.inputs.wrapped import batch_inside

        return batch_inside(model, batch=batch or ROWS, seq_len=seq_len or usual_length(model), seed=seed)

    def reload(self, folder: Path | str, device: str = "cpu") -> Any:
        """The saved model, by the class of the caller's own, which need not compute a loss, and with its kernels of attention."""
        import torch

        from kbitcheck import backends
        from kbitcheck.models import internals
        from kbitcheck.models.load import quiet

        with quiet():
            model = type(self.model).from_pretrained(
                folder, device_map={"": device}, dtype=getattr(torch, str(self.dtype))
            )
        internals.choose_implementations_of(model.config, self.model.config)
        return backends.steady(model)

    def load(self, quant: Quantization, device: str = "cpu") -> Any:
        """A copy of the model, wherever it is; ``quant`` and ``device`` are its own."""
        from kbitcheck import backends

        return backends.steady(copy.deepcopy(self.model))
