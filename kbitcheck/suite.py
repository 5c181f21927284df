"""Which cases a run consists of: plain data, no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from kbitcheck.core import UsageError
from kbitcheck.quantization import Quantization

Checkpointing = Literal["reentrant", "non-reentrant", "default", "off"]
Profile = Literal["peft", "qlora", "frozen-half"]
Freezes = Literal["at-prepare", "at-attach"]
Adapters = Literal["reference", "peft"]
Static = Literal["never", "always", "if-too-large"]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseSpec:
    """One case: a model, how it is quantized, who prepares it, and how it is checkpointed. JSON-able.

    ``batch`` and ``seq_len`` shape the inputs (``None``: what the source proposes); ``targets`` is ``all-linear`` or a
    comma-separated list of module names; ``quant`` is the text form of a ``Quantization``. ``static`` says when the
    audit reads no weights; ``memory`` is what training has to fit into, in bytes.
    """

    model: str
    quant: str
    implementation: str
    checkpointing: Checkpointing = "default"
    profile: Profile = "peft"
    freezes: Freezes = "at-prepare"
    adapters: Adapters = "reference"
    targets: str = ALL_LINEAR
    rank: int = 4
    batch: int | None = None
    seq_len: int | None = None
    seed: int = 0
    device: str = "cpu"
    random_weights: bool = False
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    static: Static = "never"
    memory: int | None = None

    @property
    def id(self) -> str:
        """Readable and unique within a run: ``tiny:llama-nf4-reentrant``."""
        return f"{self.model}-{self.quant}-{self.checkpointing}"

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``from_json`` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``as_json``."""
        return cls(**data)


QUICK: tuple[tuple[str, str, tuple[Checkpointing, ...]], ...] = (
    # Untied, grouped-query, RMSNorm, the plain path in both quantizations; nested state, half-precision packed storage.
    ("tiny:llama", "nf4,double,storage=bf16", ("non-reentrant",)),
    ("tiny:llama", "int8", ("reentrant", "off")),
    # Several towers: adapters in the one that reads pictures, whose input comes from a convolution.
    ("tiny:llava", "fp4,compute=fp32", ("reentrant",)),
    # Encoder-decoder, several readers of one tensor, fp16 weights beside fp32 ones.
    ("tiny:t5", "nf4,storage=fp16,compute=fp32", ("reentrant",)),
    ("tiny:t5", "int8", ("non-reentrant",)),
    # Tied, LayerNorm and biases; float32 compute, where a two per cent slip cannot hide in rounding.
    ("tiny:gpt2", "nf4,compute=fp32", ("reentrant", "off")),
    ("tiny:gpt2", "int8", ("default",)),
)

RECIPES = ("bert", "gemma", "gpt2", "llama", "llava", "mixtral", "opt", "qwen3", "t5", "whisper")
_GRID: tuple[tuple[str, tuple[Checkpointing, ...]], ...] = (
    ("nf4", ("reentrant", "non-reentrant", "default", "off")),
    ("nf4,double,storage=bf16", ("non-reentrant",)),
    ("fp4", ("reentrant", "non-reentrant", "off")),
    ("int8", ("reentrant", "non-reentrant", "off")),
)
FULL = tuple((f"tiny:{recipe}", quant, modes) for recipe in RECIPES for quant, modes in _GRID)


def cases(
    suite: Sequence[tuple[str, str, Sequence[Checkpointing]]],
    *,
    models: Sequence[str] = (),
    quants: Sequence[str] = (),
    checkpointing: Sequence[Checkpointing] = (),
    **options: Any,
) -> list[CaseSpec]:
    """The suite's cases, narrowed or replaced by what the user named.

    Naming models crosses them with the quantizations (nf4 and int8 by default) and modes named; naming only
    quantizations or modes crosses the suite's models with them.
    """
    for name, given in (("models", models), ("quants", quants), ("checkpointing", checkpointing)):
        if isinstance(given, str):
            raise UsageError(f"{name} is a list, of one: [{given!r}]")
    if models or quants:
        cells = [
            (model, quant, checkpointing or ("reentrant", "non-reentrant", "off"))
            for model in (models or dict.fromkeys(m for m, _, _ in suite))
            for quant in (quants or ("nf4", "int8"))
        ]
    else:
        cells = [(model, quant, checkpointing or modes) for model, quant, modes in suite]
    specs = [
        CaseSpec(model=model, quant=str(Quantization.parse(quant)), checkpointing=mode, **options)
        for model, quant, modes in cells
        for mode in modes
    ]
    return list(dict.fromkeys(specs))


def workers(specs: Sequence[CaseSpec]) -> int:
    """How many workers run at once where nobody says: one a core for recipes, else one, which may need all the memory."""
    recipes = all(spec.model.startswith("tiny:") for spec in specs)
    if not recipes:
        return 1
    # A container may have fewer cores than the machine; macOS cannot tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
