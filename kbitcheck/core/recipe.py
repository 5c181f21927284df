"""Recipes of dtypes: which profile the dtypes of a model follow, and which parameters follow none."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kbitcheck.core.anatomy import norm_parameters, tower_of
from kbitcheck.core.cases import Profile
from kbitcheck.core.facts.model import FLOATING, HALF, ModelFacts, TensorFacts
from kbitcheck.core.facts.recipe import Recipe
from kbitcheck.core.profile import PROMISES

MAGNITUDE = "lora_magnitude_vector"  # in the names of DoRA's magnitudes


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that one recipe gives one dtype: their dtypes by name.

    ``loaded_wide`` are members that were no half-precision parameters before the preparation, or that the model's class
    keeps in float32: their dtype is the model's.
    """

    name: str
    dtypes: Mapping[str, str]
    loaded_wide: frozenset[str] = frozenset()

    @property
    def prepared(self) -> Mapping[str, str]:
        """The members whose dtype the preparation decides."""
        return {name: dtype for name, dtype in self.dtypes.items() if name not in self.loaded_wide}

    @property
    def dtype(self) -> str:
        """The dtype of most members that the preparation decides; the wider one of two that are as frequent."""
        counts = Counter(self.prepared.values())
        return max(counts, key=lambda dtype: (counts[dtype], dtype not in HALF), default="")

    @property
    def mixed(self) -> bool:
        """Whether the members that the preparation decides have several dtypes."""
        return len(set(self.prepared.values())) > 1


def groups(prepared: ModelFacts, wrapped: ModelFacts, loaded: ModelFacts | None = None) -> list[Group]:
    """The groups of a model that a recipe treats alike: each tower's norms and embeddings, the heads, the adapters.

    ``wrapped`` is the model with its adapters; ``loaded`` is the model before preparation, if a case has it.
    """
    unquantized = [p for p in prepared.parameters.values() if not p.packed and not p.adapter and p.dtype in FLOATING]
    wide = frozenset(p.name for p in unquantized if _loaded_wide(p, prepared, loaded))
    parts = {"norms": norm_parameters(prepared)}
    parts |= {
        part: frozenset(p.name for p in unquantized if p.name.rpartition(".")[0] in modules)
        for part, modules in (("embeddings", prepared.embeddings), ("head", prepared.heads))
    }
    towers = tuple(dict.fromkeys(block.tower for block in prepared.blocks))
    members: dict[str, dict[str, str]] = {}
    for part, names in parts.items():
        for p in unquantized:
            if p.name in names and (part == "norms" or p.name not in parts["norms"]):
                tower = tower_of(p.name, towers) if part != "head" else ""
                members.setdefault(f"{part} of {tower}" if tower else part, {})[p.name] = p.dtype
    for p in filter(is_low_rank, wrapped.parameters.values()):
        # TRL keeps DoRA's magnitudes in float32 beside adapters in bfloat16.
        part = "magnitudes of adapters" if MAGNITUDE in p.name else "adapters"
        members.setdefault(part, {})[p.name] = p.dtype
    return [Group(name, dtypes, wide) for name, dtypes in members.items() if dtypes]


def _loaded_wide(parameter: TensorFacts, prepared: ModelFacts, loaded: ModelFacts | None) -> bool:
    if loaded is not None and parameter.name in loaded.parameters:
        return loaded.parameters[parameter.name].dtype not in HALF
    return any(f".{part}." in f".{parameter.name}." for part in prepared.kept_in_float32)


def is_low_rank(parameter: TensorFacts) -> bool:
    """Whether a parameter is an adapter's own.

    Trained copies of a head and enabled biases have the dtype of what they replace; declared parts have one of their own.
    """
    copied = ".modules_to_save." in f".{parameter.name}" or ".trainable_tokens_" in f".{parameter.name}"
    return parameter.adapter and not parameter.declared and not copied and not parameter.name.endswith(".bias")


def read(prepared: ModelFacts, loaded: ModelFacts | None = None, *, autocast: bool = False) -> Recipe:
    """The recipe that a prepared model follows; ``autocast`` says whether its forward is known to run under it."""
    parts = groups(prepared, prepared, loaded)
    decided = [g for g in parts if g.dtype]
    ends = [g for g in decided if g.name.startswith(("embeddings", "head"))]
    norms = Counter(g.dtype not in HALF for g in decided if g.name.startswith("norms"))
    profile: Profile = "frozen-half"
    if norms[True] > norms[False] or not norms:
        profile = "peft" if not _any_half(ends, prepared) else "qlora" if norms else "frozen-half"
    return Recipe(
        profile=profile,
        freezes="at-prepare" if _freezes(prepared) else "at-attach",
        adapters=next((g.dtype for g in decided if g.name == "adapters"), ""),
        autocast=autocast or PROMISES[profile].autocast,
        mixed=any(g.mixed for g in parts),
        towers_differ=len(norms) > 1,
    )


def _any_half(ends: list[Group], prepared: ModelFacts) -> bool:
    """Whether an embedding or the head is in half precision; in a model without both, any unquantized parameter."""
    if ends:
        return any(dtype in HALF for group in ends for dtype in group.prepared.values())
    return any(p.dtype in HALF and not p.packed and not p.adapter for p in prepared.parameters.values())


def _freezes(prepared: ModelFacts) -> bool:
    """Whether most unquantized parameters are frozen: some models load a few of theirs frozen."""
    unquantized = [p for p in prepared.parameters.values() if not p.packed and not p.adapter and p.dtype in FLOATING]
    return 2 * sum(not p.requires_grad for p in unquantized) > len(unquantized)
