"""Local directories with weights: safetensors, whole or sharded, quantized by bitsandbytes or not quantized yet."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbitcheck.core.errors import UsageError
from kbitcheck.models import checkpoint
from kbitcheck.models.sources.source import Source, config_dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Local(Source):
    """A checkpoint in a directory; ``stored`` is the dtype that most of its floating tensors have."""

    folder: Path
    stored: str | None = None

    @property
    def checkpoint(self) -> Path:
        """The directory itself."""
        return self.folder

    @property
    def drawn(self) -> bool:
        """Never."""
        return False

    @property
    def unquantized_dtype(self) -> str:
        """What the user requests, else what the configuration states, else what the tensors have."""
        return self.dtype or config_dtype(self.config) or self.stored or "float32"


def read(folder: Path, files: list[Path], config: Mapping[str, Any], *, name: str, **options: Any) -> Local:
    """The checkpoint in a directory, once the headers of its weight ``files`` (``checkpoint.weight_files``) are sound."""
    safe = [file for file in files if file.suffix == ".safetensors"]
    dtypes = [dtype for file in safe for dtype in checkpoint.read_dtypes(file, name)]
    if safe and not dtypes:
        raise UsageError(f"{name}: {safe[0].name} holds no tensors")
    return Local(name=name, config=config, folder=folder, stored=checkpoint.floating_dtype(dtypes), **options)
