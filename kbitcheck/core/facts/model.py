"""A model at one stage, a call of an implementation, and a save."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kbitcheck.core.errors import Raised
from kbitcheck.core.methods import Loading, Treatment

HALF = frozenset({"float16", "bfloat16"})
FLOATING = HALF | {"float32", "float64"}
BASES = ("base_layer", "original_module")  # what an adapter's layer calls the base's
# Before and after, by name of a process-wide setting or dotted name of what a library holds.
Changes = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFacts:
    """One parameter or buffer. ``storage`` numbers the memory it lives in: equal numbers share it.

    ``value`` hashes the numbers as float64, whatever the dtype (None for packed weights and for what is not floating).
    ``adapter`` is True if the parameter is to train: as part of an adapter or, if ``declared``, as the caller says.
    """

    name: str
    cls: str
    dtype: str
    shape: tuple[int, ...]
    device: str
    requires_grad: bool
    storage: int
    nbytes: int
    bits: str
    value: str | None = None
    packed: bool = False
    adapter: bool = False
    declared: bool = False
    quantized_bias: bool = False
    has_grad: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """One quantized layer, recognised by its type and its quantization state. ``state`` maps each field of the state to a digest.

    One that does not ``multiplies`` holds a weight that another module reads unpacked, in the dtype ``compute``; ``experts`` is the
    number of matrices in it. A ``stack`` is a parameter that packs the weights of several experts; its features out are those of all of them.
    ``input_ulp`` is the relative distance of the numbers that its input is rounded to, 0 where ``compute`` is no finer.
    ``zero_rows`` counts the rows of the unpacked weight whose norm is zero or subnormal in its dtype; None without numbers.

    ``fixed`` is the one dtype that it takes, of inputs or of a bias; "" where it takes any. ``promises_upcast`` says that
    preparations promise float32 around such layers.
    ``laid_out_before`` digests the packed weight as it was before the library's own forward laid it out anew; "" where none did.
    """

    name: str
    cls: str
    scheme: str
    in_features: int
    out_features: int
    compute: str
    rounds_input: bool
    state: Mapping[str, str]
    dequantized: str
    laid_out_before: str = ""
    stack: bool = False
    multiplies: bool = True
    experts: int = 1
    input_ulp: float = 0.0
    zero_rows: int | None = None
    fixed: str = ""
    promises_upcast: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFacts:
    """One module. ``checkpointing`` is its flag (None where it has none); ``norm`` is what makes it look like a norm.

    ``numbers`` are the plain numbers that it keeps: an epsilon, a scale, a dropout rate.
    """

    name: str
    cls: str
    training: bool
    checkpointing: bool | None
    hooks: tuple[str, ...]
    norm: frozenset[str] = frozenset()
    block: bool = False
    tower: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model at one stage: loaded, prepared, wrapped or stepped.

    ``kept_in_float32`` are the parts of parameter names that the model's class loads in float32, whatever dtype is requested.
    ``marks`` are the model's own public attributes, such as those by which libraries see that it is quantized, as text.
    """

    cls: str
    parameters: Mapping[str, TensorFacts]
    buffers: Mapping[str, TensorFacts]
    layers: Mapping[str, LayerFacts]
    modules: Mapping[str, ModuleFacts]
    config: Mapping[str, Any]
    can_checkpoint: bool
    embeddings: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    kept_in_float32: tuple[str, ...] = ()
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def blocks(self) -> list[ModuleFacts]:
        """The modules that transformers checkpoints one by one."""
        return [m for m in self.modules.values() if m.block]

    @property
    def takes_adapters(self) -> bool:
        """Whether any quantized layer can take an adapter of its own."""
        return any(not layer.stack for layer in self.layers.values())

    def holder(self, parameter: str) -> LayerFacts | None:
        """The quantized layer that a packed parameter of this name belongs to."""
        return self.layers.get(parameter) or self.layers.get(parameter.rpartition(".")[0])

    @property
    def adapters(self) -> frozenset[str]:
        """The names of the parameters that are meant to train."""
        return frozenset(name for name, parameter in self.parameters.items() if parameter.adapter)

    def adapted(self, parameter: str) -> str:
        """The layer under an adapter that a parameter belongs to, the innermost one; "" where there is none."""
        layer = parameter.rpartition(".")[0]
        while layer and not any(f"{layer}.{base}" in self.modules for base in BASES):
            layer = layer.rpartition(".")[0]
        return layer

    @property
    def packed(self) -> dict[str, TensorFacts]:
        """The packed weights by name: parameters, and of some quantizers buffers."""
        return {n: t for tensors in (self.parameters, self.buffers) for n, t in tensors.items() if t.packed}

    @property
    def nbytes(self) -> int:
        """Bytes of parameters and buffers, each storage once."""
        tensors = [*self.parameters.values(), *self.buffers.values()]
        return sum({t.storage: t.nbytes for t in tensors}.values())

    def ties(self) -> set[frozenset[str]]:
        """Groups of parameter names that share memory."""
        groups: dict[int, set[str]] = {}
        for tensor in self.parameters.values():
            groups.setdefault(tensor.storage, set()).add(tensor.name)
        return {frozenset(g) for g in groups.values() if len(g) > 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFacts:
    """One call of an implementation. ``checkpoints``: a block's flag is on after the call.

    ``logged`` are the warnings that libraries logged. ``modes_changed`` are the modules whose train or eval mode changed.
    ``process`` maps what changed in the process (a seed, a default, a class attribute) to ``(before, after)``; ``parameters``
    maps the signature's names to the text of their defaults ("" where there is none).
    """

    raised: Raised | None = None
    same_object: bool = True
    returned: str = ""
    warnings: tuple[str, ...] = ()
    logged: tuple[str, ...] = ()
    kwargs_before: str = ""
    kwargs_after: str = ""
    class_kept: bool = True
    checkpoints: bool = False
    modes_changed: tuple[str, ...] = ()
    process: Changes = field(default_factory=dict)
    parameters: Mapping[str, str] | None = None
    accepts_any: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedCall:
    """A call on an architecture that does not support checkpointing, with the model before and after it."""

    call: CallFacts
    before: ModelFacts
    after: ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptersFirst:
    """A call on a model that already carries adapters: the names of those that were trainable, and of those that still are."""

    call: CallFacts
    before: frozenset[str]
    after: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """A call that passes arguments of checkpointing, in one of the forms that callers use.

    ``asked`` are those arguments as text; ``kept`` what the blocks are checkpointed with after the call, None where a function
    of the implementation's own hides it.
    """

    raised: Raised | None
    asked: Mapping[str, str]
    kept: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFacts:
    """The packed weights of a checkpoint beside the model that they were loaded into, by the model's names of them.

    ``states`` is how many there are, ``lost`` says why some are not unpacked there, and ``differing`` which of their tensors
    are not the checkpoint's. Where no weights were read, nothing differs.
    """

    states: int
    lost: Mapping[str, str]
    differing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerFacts:
    """What is requested of a model's quantization, and what transformers and the preparation do with its method.

    ``scheme`` and ``skip`` are what was requested: of a checkpoint that is quantized already, what it says of itself.
    ``loading`` is None where no method is known; ``treatment`` is of a preparation that is not run.
    ``packed`` and ``unpacked`` are the model's bytes with its quantized weights as they are stored (0 where the model was unpacked
    before it was looked at), and as plain numbers.
    ``listed`` are the modules that a checkpoint's own list leaves out, by the names that they have in the model; ``left_out``
    has for each linear layer the entry of that list for which transformers leaves it out, "" where it does not.
    """

    scheme: str
    skip: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    loading: Loading | None = None
    treatment: Treatment | None = None
    packed: int = 0
    unpacked: int = 0
