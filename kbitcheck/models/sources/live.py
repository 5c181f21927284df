"""A quantized model that the caller already has."""

import copy
from dataclasses import dataclass
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

        kinds = sorted({backends.recognition(m).scheme(m) for _, m in backends.quantized_layers(self.model)})
        if not kinds:
            raise UsageError(f"{self.name} has no quantized layer: load it with a quantization_config first")
        return str(kinds[0])

    def load(self, quant: Quantization, device: str = "cpu") -> Any:
        """A copy of the model, wherever it is; ``quant`` and ``device`` are its own."""
        from kbitcheck import backends

        return backends.steady(copy.deepcopy(self.model))
