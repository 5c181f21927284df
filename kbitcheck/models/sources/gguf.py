"""GGUF files: dequantized to a temporary safetensors directory, and that is what bitsandbytes quantizes.

transformers reads GGUF, but refuses to combine it with another quantizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources import config
from kbitcheck.models.sources.source import Source

SUFFIX = ".gguf"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gguf(Source):
    """The weights in a GGUF file."""

    file: Path

    @property
    def checkpoint(self) -> Path:
        """The directory with the dequantized weights; made once a process, and removed when it ends."""
        from kbitcheck.models.sources import gguf_dequantize as dequantizing

        return dequantizing.checkpoint(self.file, self._options("cpu"))

    @property
    def unquantized_dtype(self) -> str:
        """What the user requests, else bfloat16: the file does not say what it was made from."""
        return self.dtype or "bfloat16"

    @property
    def notes(self) -> tuple[str, ...]:
        """A remark that these are not the weights that were trained."""
        return (f"GGUF was dequantized to {self.unquantized_dtype} and then quantized anew: {self.file.name}",)


def file_of(path: Path, name: str) -> Path | None:
    """The GGUF file that a path is, or that is the only one in a directory; None where there is none."""
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        raise UsageError(f"{name} holds {len(files)} GGUF files: give one of them, such as {files[0]}")
    return files[0] if files else None


def read(file: Path, *, name: str, random_weights: bool, static: bool, **options: Any) -> Source:
    """The source for a GGUF file, once its header is read; ``static`` says that its sizes are enough."""
    if find_spec("gguf") is None:
        raise UsageError(f"{name} is GGUF, which is read by the gguf package: pip install 'kbitcheck[gguf]'")
    from kbitcheck.models.sources import gguf_dequantize as dequantizing

    fields: Mapping[str, Any] = dequantizing.config(file, name)
    if static or random_weights:
        described = fields if random_weights else {**fields, "quantization_config": {"quant_method": "gguf"}}
        return config.read(described, name=name, random_weights=random_weights, static=static, **options)
    return Gguf(name=name, config=fields, file=file, **options)
