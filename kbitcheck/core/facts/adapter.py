"""A saved adapter, as its files have it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """One stored tensor; ``key`` is its name in the file, ``part`` what it is to its layer: ``lora_A``, or ``weight`` of a module.

    ``not_finite`` counts the numbers that are infinite or not a number. ``at_zero``: every number is zero. ``own``: it takes the place of
    the base's own tensor of this name; ``trains``: because the configuration says so, and not only to go with the adapter. ``rows`` are those
    of the base's weight that it takes the place of; None where the tensor is no list of rows.
    """

    key: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    not_finite: int
    at_zero: bool
    own: bool = False
    trains: bool = False
    rows: tuple[int, ...] | None = None

    @property
    def of_base(self) -> str:
        """The name that the base's tensor has in its module."""
        return self.part if self.rows is None else "weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedLayer:
    """What an adapter stores for one module of its base.

    ``rank`` is that of the tensors, ``asked`` the one that the configuration states for the module, ``scaling`` what multiplies the
    product; None where the method has none. ``norm`` is the Frobenius norm of what is added to the weight, None where the file alone
    does not say it. ``moved`` is None where the start of training is not stored. ``whole``: the module's own tensors are stored, and no
    adapter. Of a stack of ``experts``, ``still`` are those that did not move. ``module`` is empty for what all layers share. ``placed`` is
    the base's module that gets it, if that has another name there.
    """

    module: str
    tensors: Mapping[str, SavedTensor]
    rank: int | None = None
    asked: int | None = None
    scaling: float | None = None
    norm: float | None = None
    moved: bool | None = None
    whole: bool = False
    experts: int = 1
    still: tuple[int, ...] = ()
    placed: str = ""

    @property
    def target(self) -> str:
        """The last part of the module's path that is no number: ``q_proj``."""
        parts = [part for part in self.module.split(".") if part != BASE_LAYER and not part.isdecimal()]
        return parts[-1] if parts else self.module

    @property
    def of_base(self) -> str:
        """The path of the base's module: that of a nested adapter is its outermost one's."""
        return self.placed or self.stated

    @property
    def stated(self) -> str:
        """The path of the module as the file has it, that of a nested adapter as its outermost one's."""
        return ".".join(part for part in self.module.split(".") if part != BASE_LAYER)

    @property
    def gathered(self) -> bool:
        """Whether it is a part of what the base's module gets: an expert's, of a stack of experts."""
        return self.placed.rpartition(".")[2] not in ("", self.target)

    @property
    def replaced(self) -> bool:
        """Whether all that is stored takes the place of tensors of the base."""
        return len(self.replacing) == len(self.tensors)

    @property
    def replacing(self) -> tuple[SavedTensor, ...]:
        """The tensors that take the place of the base's own ones, or of rows of these."""
        return tuple(tensor for tensor in self.tensors.values() if tensor.own or tensor.rows is not None)


BASE_LAYER = "base_layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAdapter:
    """An adapter's configuration and tensors.

    ``method`` is its type (``LORA``). ``starts`` names the tensors that are zero where a layer never moved; where there are none,
    ``cannot_tell`` says why. ``required`` are the sets of parts of which a layer has one. ``asked`` are the targets that the configuration
    names, by path, by the end of one or by a ``pattern``; ``base`` is the model that it names, ``task`` what it is used for.
    """

    method: str
    layers: Mapping[str, SavedLayer]
    starts: tuple[str, ...] = ()
    cannot_tell: str = ""
    required: tuple[tuple[str, ...], ...] = ()
    asked: tuple[str, ...] = ()
    pattern: str = ""
    base: str = ""
    task: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A tensor that is stored whole, beside the base's: ``change`` is the norm of their difference beside that of the base's tensor.

    ``rows`` of the base's ``count`` rows differ; rows that the file has beyond these are left out. Where the file has another dtype than the
    base, the base's numbers are first rounded to it.
    """

    change: float
    rows: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedLayer:
    """One layer of an adapter that was merged into float32 weights, and unmerged.

    ``landed`` is the share of what the adapter adds that the merge added, by its projection: 0 where it was dropped, 2 where it was added
    twice; of a stack of experts, one for each. ``bound`` is what rounding may move it by. ``restored`` is how far the weight is from
    where it was once it is unmerged, beside the norms of the weight and of what was added.
    """

    module: str
    landed: tuple[float, ...]
    bound: float
    restored: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeFacts:
    """An adapter on its base, and merged into several forms of it.

    ``errors`` has, by form, how far the logits are from those of the float64 twin with the adapter, and ``effect`` how far those are from the
    twin's without it; all beside the norm of the twin's logits. ``refused`` are the forms that the method cannot be merged into, ``unread``
    the layers of which nothing could be said.
    """

    layers: tuple[MergedLayer, ...]
    errors: Mapping[str, float]
    effect: float
    unread: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
