"""Where models come from: recipes, local directories, the hub, and configurations without weights. No torch here."""

from __future__ import annotations

from pathlib import Path

from kbitcheck.core import UsageError
from kbitcheck.models import recipe
from kbitcheck.models.source import Source

__all__ = ["Source", "resolve"]


def resolve(
    model: str,
    *,
    random_weights: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Source:
    """The source that a MODEL argument names.

    Raises:
        UsageError: there is no such model.
    """
    if model.startswith(recipe.PREFIX):
        return recipe.named(model.removeprefix(recipe.PREFIX), dtype=dtype)
    if model.endswith(".toml"):
        return recipe.read(Path(model), dtype=dtype)
    raise UsageError(f"no such model {model!r}")
