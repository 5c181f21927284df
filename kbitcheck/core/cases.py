"""A case as plain data: a model, its quantization, the implementation that prepares it, and its checkpointing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from kbitcheck.core.adapters import as_text
from kbitcheck.core.compositions import Composition

Checkpointing = Literal["reentrant", "non-reentrant", "default", "off"]
Profile = Literal["auto", "peft", "qlora", "frozen-half"]
Freezes = Literal["at-prepare", "at-attach"]
Static = Literal["never", "always", "if-too-large"]
Autocast = Literal["default", "bf16", "fp16", "none"]
UseCut = Literal["if-large", "always", "never"]
Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw"]
Attention = Literal["default", "sdpa", "eager", "flash_attention_2"]
Loss = Literal["full", "chunked", "fused"]
ALL_LINEAR = "all-linear"
OWN_RANK = 4  # of the adapters of a case
MODEL_RANK = 16  # of the adapters in `kbitcheck model`, as people train; suites take fewer, for speed
REFERENCE = "reference"  # the implementation that comes with kbitcheck


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseSpec:
    """One case: a model, its quantization, the implementation that prepares it, and its checkpointing. JSON-able.

    ``batch`` and ``seq_len`` shape the inputs (``None``: what the source proposes); ``targets`` is ``all-linear`` or a
    comma-separated list of module names; ``quant`` is the text form of a ``Quantization``, ``adapters`` that of ``core.adapters``.
    ``static`` says when the audit reads no weights. For the forecast: ``memory`` is what training has to fit into, in bytes, and ``gpu`` the GPU
    that has it, if one was named; ``cells`` requests steps of usual shapes beside it, ``fits`` the table of common GPUs;
    ``accumulate`` is the number of batches that an optimizer step adds up, ``gpus`` that of GPUs. Steps are forecast under
    ``autocast``, with ``attention``, ``packed`` sequences and ``loss``, and with images of
    ``image_size`` pixels a side where the model's configuration states none: no rule reads them.
    ``cut`` says when facts about code paths run on a cut of the model. ``conditions`` are those that are looked at of many: ``all``,
    a ``few``, one by its name, a share such as ``2/9`` that the seed draws, or none (empty).
    ``composition`` is what the prepared model is put into; where there is one, rules about compositions judge the case, and no others.
    """

    model: str
    quant: str
    implementation: str
    checkpointing: Checkpointing = "default"
    profile: Profile = "peft"
    freezes: Freezes = "at-prepare"
    adapters: str = "reference"
    targets: str = ALL_LINEAR
    rank: int = OWN_RANK
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
    gpu: str = ""
    autocast: Autocast = "default"
    cut: UseCut = "if-large"
    fits: bool = False
    cells: bool = False
    optimizer: Optimizer = "adamw"
    accumulate: int = 1
    gpus: int = 1
    attention: Attention = "default"
    packed: bool = False
    loss: Loss = "full"
    image_size: int | None = None
    conditions: str = ""
    composition: Composition = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", as_text(self.adapters))

    @property
    def id(self) -> str:
        """Readable and unique within a run: ``tiny:llama-nf4-reentrant``."""
        return "-".join(filter(None, (self.model, self.quant, self.checkpointing, self.composition)))

    @property
    def about(self) -> Literal["model", "composition"]:
        """What the rules that judge the case are about."""
        return "composition" if self.composition else "model"

    @property
    def entropy(self) -> str:
        """What its own draws hang on: the seed and the case, wherever the model's file lies."""
        return f"{self.seed} {self.model.rpartition('/')[2]}-{self.quant}-{self.checkpointing}"

    @property
    def scaling(self) -> float:
        """What the adapters' update is multiplied by: their alpha, divided by their rank."""
        return 2.0

    @property
    def layers(self) -> Sequence[str] | None:
        """The layers that the adapters are on, of those that ``targets`` names; None: all of these."""
        return None

    @property
    def attached(self) -> tuple[Any, ...]:
        """What two cases of one base have in common if their adapters are the same."""
        return self.adapters, self.rank, self.scaling, self.layers, self.seed

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``from_json`` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``as_json``."""
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class WitnessSpec(CaseSpec):
    """The case of a witness, which draws what the case draws that it is a witness of."""

    draws: str

    @property
    def entropy(self) -> str:
        """That of the other case."""
        return self.draws

    @classmethod
    def of(cls, spec: CaseSpec, *, implementation: str, checkpointing: str) -> Self:
        """The same case with another preparation, in a mode of its own."""
        same = {**spec.as_json(), "implementation": implementation, "checkpointing": checkpointing}
        return cls(**{**same, "draws": spec.entropy})


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptersSpec(CaseSpec):
    """A case with adapters of a rank, a scaling and layers of their own."""

    scaled_by: float
    on: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """That of its own adapters."""
        return self.scaled_by

    @property
    def layers(self) -> Sequence[str]:
        """Those of its own adapters."""
        return self.on

    @classmethod
    def of(cls, spec: CaseSpec, *, rank: int, scaling: float, layers: Sequence[str]) -> Self:
        """The same case with other adapters."""
        same = {field.name: getattr(spec, field.name) for field in fields(CaseSpec)}
        return cls(**{**same, "rank": rank, "scaled_by": scaling, "on": tuple(layers)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """A preparation function and where it comes from. ``line`` is 0 where the source is not known.

    ``imported`` is what its import changed in the process, before and after, and in the libraries that training rests on.
    """

    name: str
    function: Callable[..., Any]
    version: str = ""
    file: str = ""
    line: int = 0
    imported: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Everything but the function itself."""
        return {"name": self.name, "version": self.version, "file": self.file, "line": self.line}
