"""The case of a saved adapter: what rules read of its files and of its base's structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable, UsageError
from kbitcheck.core.facts import Fact, ModelFacts
from kbitcheck.core.facts.adapter import MergeFacts, Replacement, SavedAdapter, SavedLayer
from kbitcheck.core.facts.case import OpenCase
from kbitcheck.models.sources import hub
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.adapter import folder

if TYPE_CHECKING:
    from kbitcheck.models.sources.source import Source
    from kbitcheck.observe.adapter.merge import Merge

DEFAULT = "nf4"
NOT_SAVED = "an adapter's files do not show it"


class AdapterCase(OpenCase):
    """Facts of a saved adapter. Nothing runs: tensors are read once, and the base is built without numbers.

    ``base`` names the base; where it is empty, the one that the configuration names is taken, if it is on this machine.
    """

    def __init__(
        self,
        path: Path,
        *,
        base: str = "",
        quant: str = "",
        trust_remote_code: bool = False,
        merging: Merge | None = None,
    ) -> None:
        stated = folder.read_config(path).get("base_model_name_or_path") or ""
        self._missing = (
            "" if base or _is_here(stated) else f"its base {stated} is not here" if stated else "it names no base"
        )
        self._name = base or stated
        self._code = trust_remote_code
        self._path, self._quant, self._merging = path, quant, merging
        self._merges = bool(base)
        self._read = folder.read(path)
        super().__init__(CaseSpec(model=str(path), quant="", implementation=""))
        self.case = str(path)
        if base:
            _ = self.base  # what was asked for has to be there

    def compute(self, name: str) -> Any:
        """No other fact is seen."""
        raise Unavailable(NOT_SAVED)

    @Fact
    def adapter(self) -> SavedAdapter:
        """What the files hold; beside a base, with the base's names for its modules."""
        if self._missing:
            return self._read
        from kbitcheck.observe.adapter import renamed

        return renamed.beside(self._structure, self._read)

    @Fact
    def base(self) -> ModelFacts:
        """The base as its configuration describes it, not quantized."""
        if self._missing:
            raise Unavailable(f"{self._missing}: --base MODEL names it")
        from kbitcheck.observe.probes import snapshot  # slow to import, and only needed beside a base

        return snapshot.snapshot(self._structure)

    @cached_property
    def _structure(self) -> Any:
        """The base without numbers."""
        try:
            return resolve(self._name, static="always", trust_remote_code=self._code).meta(None)
        except UsageError as error:
            raise UsageError(f"the base: {error}") from None

    @Fact
    def replaced(self) -> Mapping[str, Replacement]:
        """The tensors that are stored whole, beside the base's, which is loaded for it."""
        source = self._source("a comparison with the base's weights")
        from kbitcheck.observe.adapter import replaced  # slow to import, and only needed beside a base

        return replaced.replacements(source, self._path, self._read)

    @Fact
    def merge(self) -> MergeFacts:
        """The adapter merged into its base, which is loaded for it."""
        source = self._source("a merge")
        from kbitcheck.observe.adapter import merge

        quant = Quantization.parse(self._quant or source.quant or DEFAULT)
        return merge.facts(source, quant, self._path, self._read, self._merging or merge.merge)

    def _source(self, what: str) -> Source:
        """Where the base's weights come from."""
        if not self._merges:
            raise Unavailable(f"{what} needs the base itself: --base MODEL names it")
        try:
            source = resolve(self._name, trust_remote_code=self._code)
            _ = source.checkpoint
        except UsageError as error:  # a configuration alone will do for all else
            raise Unavailable(f"{what} needs the base's weights: {error}") from None
        return source

    def summary(self) -> dict[str, Any]:
        """Figures for a report: the layers by target."""
        layers = [layer for layer in self._read.layers.values() if layer.module]
        groups: dict[str, list[SavedLayer]] = {}
        replaced = self.replaced if "replaced" in self.computed else {}
        for layer in layers:
            groups.setdefault(layer.target, []).append(layer)
        return {
            "adapter": {
                "method": self._read.method,
                "base": self._name,
                "compared": "" if self._missing else self._name,
                "missing": self._missing,
                "cannot_tell": "" if replaced and all(layer.replaced for layer in layers) else self._read.cannot_tell,
                **({"merge": _merge_figures(self.merge)} if "merge" in self.computed else {}),
                "targets": {target: _figures(group, replaced) for target, group in groups.items()},
            }
        }


def _merge_figures(merge: MergeFacts) -> dict[str, Any]:
    return {
        "errors": dict(merge.errors),
        "effect": merge.effect,
        "layers": len(merge.layers),
        "unread": len(merge.unread),
        "refused": list(merge.refused),
    }


def _figures(layers: list[SavedLayer], replaced: Mapping[str, Replacement]) -> dict[str, Any]:
    norms = [layer.norm for layer in layers if layer.norm is not None]
    seen = [layer for layer in layers if layer.moved is not None]
    beside = [replaced[t.key] for layer in layers for t in layer.replacing if t.key in replaced]
    return {
        "layers": len(layers),
        "whole": all(layer.whole for layer in layers),
        "experts": sum(layer.experts for layer in layers if layer.experts > 1),
        "ranks": sorted({layer.rank for layer in layers if layer.rank is not None}),
        "scalings": sorted({layer.scaling for layer in layers if layer.scaling is not None}),
        "dtypes": dict(Counter(tensor.dtype for layer in layers for tensor in layer.tensors.values())),
        "moved": sum(bool(layer.moved) for layer in seen) if seen else None,
        "norms": [min(norms), max(norms)] if norms else [],
        "beside": any(layer.replacing and not layer.replaced for layer in layers),
        "rows": sum(len(t.rows) for layer in layers for t in layer.replacing if t.rows is not None),
        "replaced": {
            "changes": sorted(each.change for each in beside),
            "rows": sum(each.rows for each in beside),
            "count": sum(each.count for each in beside),
        },
        "not_finite": sum(tensor.not_finite for layer in layers for tensor in layer.tensors.values()),
    }


def _is_here(name: str) -> bool:
    """Whether a base can be read without a network: a directory, a recipe, or a model in the hub cache."""
    return bool(name) and (Path(name).expanduser().exists() or name.startswith("tiny:") or name in hub.cached())
