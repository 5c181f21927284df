"""The quantization methods of transformers: what it says of each here, and what a preparation does with a model of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What transformers says of checkpoints of one quantization method on this machine.

    ``refused`` is why it does not load them; ``unpacked`` is what turns packed weights into plain numbers ("loading", "the first
    forward"), empty where nothing does.
    ``trainable`` is ``yes``, ``no``, ``depends on SETTING`` or ``needs PACKAGE``.
    """

    method: str
    refused: str = ""
    unpacked: str = ""
    trainable: str = ""

    @property
    def summary(self) -> str:
        """Whether such a checkpoint is loaded, in a few words."""
        return self.refused or (f"yes; {self.unpacked} unpacks its weights" if self.unpacked else "yes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """What a preparation does with a model that is quantized by a method: with its parameters and with checkpointing."""

    freezes: bool
    casts: bool
    checkpoints: bool

    def __str__(self) -> str:
        does = {"freezes": self.freezes, "casts": self.casts, "checkpoints": self.checkpoints}
        words = ", ".join(word for word, done in does.items() if done) or "changes nothing"
        return words if self.checkpoints else f"{words}; leaves checkpointing off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A row of ``kbitcheck backends``. ``audit`` is the most that kbitcheck does here; ``why`` is why it does no more.

    ``treatment`` is what PEFT's function does; None where PEFT is not installed.
    """

    loading: Loading
    treatment: Treatment | None
    schemes: tuple[str, ...] = ()
    audit: str
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        """The row as plain data."""
        return {
            **asdict(self.loading),
            "peft": None if self.treatment is None else asdict(self.treatment),
            "schemes": list(self.schemes),
            "audit": self.audit,
            "why": self.why,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Methods:
    """Every quantization method that the installed transformers lists; ``versions`` of the packages that decide."""

    versions: Mapping[str, str]
    rows: tuple[Method, ...]

    def as_json(self) -> dict[str, Any]:
        """The table as plain data."""
        return {"versions": dict(self.versions), "methods": [row.as_json() for row in self.rows]}
