"""Backends whose checkpoints are laid out as they are published, and do not run. No torch here."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from kbitcheck.backends.protocol import Backend, Recognition
from kbitcheck.backends.schemes import Choice
from kbitcheck.core.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


class LaidOut(Backend):
    """It recognises the layers that its ``lay_out`` made."""

    static_only = "its layers are not run: sizes are those of its published layout"

    @cached_property
    def recognition(self) -> Recognition:
        from kbitcheck.backends.packed import PackedHolders

        return PackedHolders([scheme.name for scheme in self.schemes])


class RunByPackage(LaidOut):
    """Where its package is installed, ``layers`` recognises that package's layers, too, and ``put`` puts them into a loaded model."""

    package: ClassVar[str] = ""

    @cached_property
    def recognition(self) -> Recognition:
        return super().recognition if self.not_on_load() else self.layers()

    def layers(self) -> Recognition:
        """What says of the package's layers, and of those that ``lay_out`` made, what they hold."""
        raise NotImplementedError

    def not_on_load(self) -> str:
        if importlib.util.find_spec(self.package):
            return ""
        package, extra = (name.replace("_", "-") for name in (self.package, self.name))
        return f"{package} is not installed: pip install 'kbitcheck[{extra}]'"

    def quantize(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        if why := self.not_on_load() or self.scheme(choice.scheme).stored_alone:
            raise UsageError(f"{choice} cannot be run: {why}")
        self.put(model, choice, skip)

    def put(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        """Put the package's layers into a model, in place and also on the meta device; the modules named in ``skip`` stay."""
        raise NotImplementedError
