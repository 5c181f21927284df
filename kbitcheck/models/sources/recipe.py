"""``tiny:NAME`` and recipe files: small models described by data, with random weights."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.models.sources.source import Source, requested_dtype

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kbitcheck.models.random_weights import Plan

PREFIX = "tiny:"
FIELDS: dict[str, type] = {
    "about": str,
    "architecture": str,
    "dtype": str,
    "seed": str,
    "batch": int,
    "seq_len": int,
    "lengths": list,
    "skip": list,
    "scale": dict,
    "unread": dict,
    "config": dict,
}
REQUIRED = ("architecture", "config")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe(Source):
    """A model drawn from a recipe. ``unread`` holds shapes of float32 tensors that are added and that nothing reads.

    They stand for a parameter and a buffer that preparation must leave alone, where the architecture has none. ``seed``,
    the file's name unless the file states another, and a tensor's name determine the tensor's numbers. ``lengths`` are
    the tokens of each row of the batch, where the recipe states them.
    """

    seed: str
    rows: int = 2
    seq_len: int = 24
    lengths: tuple[int, ...] = ()
    skip: tuple[str, ...] = ()
    scale: Mapping[str, float] = field(default_factory=dict)
    unread: Mapping[str, Mapping[str, list[int]]] = field(default_factory=dict)

    attention: ClassVar[str | None] = "eager"

    @property
    def plan(self) -> Plan:
        """What the weights are drawn by."""
        return replace(super(Recipe, self).plan, seed=self.seed, scale=self.scale)

    def batch(
        self, model: PreTrainedModel, *, batch: int | None = None, seq_len: int | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """A training batch, of the recipe's own size unless the caller names one."""
        if self.lengths and batch is None and seq_len is None:
            from kbitcheck.models.inputs.text import draw

            return draw(model, batch=len(self.lengths), seq_len=max(self.lengths), seed=seed, lengths=self.lengths)
        return Source.batch(self, model, batch=batch or self.rows, seq_len=seq_len or self.seq_len, seed=seed)

    def _complete(self, quant: Quantization) -> Quantization:
        return replace(quant, skip=tuple(dict.fromkeys((*self.skip, *quant.skip))))

    def finished(self, model: PreTrainedModel, skip: tuple[str, ...] = ()) -> PreTrainedModel:
        from torch import nn

        from kbitcheck.models.random_weights import normal

        for kind, tensors in self.unread.items():
            for name, shape in tensors.items():
                owner, _, leaf = name.rpartition(".")
                module = model.get_submodule(owner)
                numbers = normal(f"{self.seed}/{name}", tuple(shape)).to(model.device)
                if kind == "parameters":
                    module.register_parameter(leaf, nn.Parameter(numbers))
                else:
                    module.register_buffer(leaf, numbers, persistent=False)
        return Source.finished(self, model, skip)


def names() -> list[str]:
    """The recipes that ``tiny:`` knows, sorted."""
    return sorted(path.stem for path in _shelf().glob("*.toml"))


def named(name: str, *, dtype: str | None = None) -> Recipe:
    """The recipe behind ``tiny:NAME``."""
    recipes = names()
    if name not in recipes:
        hint = did_you_mean(PREFIX + name, [PREFIX + each for each in recipes], cutoff=0.75)
        raise UsageError(f"no recipe {PREFIX}{name}{hint}; there are {', '.join(recipes)}")
    return read(_shelf() / f"{name}.toml", name=f"{PREFIX}{name}", dtype=dtype)


def read(path: Path, *, name: str | None = None, dtype: str | None = None) -> Recipe:
    """The recipe in a TOML file."""
    name = name or str(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} is not a recipe ({error})") from None
    _check_fields(name, data)
    config = {**data["config"], "architectures": [data["architecture"]]}
    return Recipe(
        name=name,
        seed=data.get("seed", path.stem),
        config={**config, "dtype": requested_dtype(data.get("dtype", "bf16"))},
        dtype=dtype,
        rows=data.get("batch", 2),
        seq_len=data.get("seq_len", 24),
        lengths=tuple(data.get("lengths", ())),
        skip=tuple(data.get("skip", ())),
        scale=data.get("scale", {}),
        unread=data.get("unread", {}),
    )


def _check_fields(name: str, data: Mapping[str, Any]) -> None:
    for key, value in data.items():
        if key not in FIELDS:
            raise UsageError(f"{name}: unknown field {key!r}; known: {', '.join(FIELDS)}")
        if type(value) is not FIELDS[key]:
            raise UsageError(f"{name}: {key} must be {FIELDS[key].__name__}, not {type(value).__name__}")
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{name}: {key} must be at least 1, not {value}")
    if any(type(length) is not int or length < 1 for length in data.get("lengths", ())):
        raise UsageError(f"{name}: lengths must be numbers of tokens, at least 1")
    missing = [key for key in REQUIRED if key not in data]
    if missing or "model_type" not in data["config"]:
        raise UsageError(f"{name}: a recipe needs {', '.join(missing) or 'config.model_type'}")
    if not set(data.get("unread", {})) <= {"parameters", "buffers"}:
        raise UsageError(f"{name}: unread may hold parameters and buffers")


def _shelf() -> Path:
    """Beside the package in a wheel, beside its folder in a checkout."""
    package = Path(__file__).parents[2]
    return next(p for p in (package / "fixtures", package.parent / "fixtures") if p.is_dir())
