"""A backend whose checkpoints are laid out as they are published, and whose layers do not run. No torch here."""

from __future__ import annotations

from functools import cached_property

from kbitcheck.backends.protocol import Backend, Recognition


class LaidOut(Backend):
    """It recognises the layers that its ``lay_out`` made."""

    static_only = "its layers are not run: sizes are those of its published layout"

    @cached_property
    def recognition(self) -> Recognition:
        from kbitcheck.backends.packed import PackedHolders

        return PackedHolders([scheme.name for scheme in self.schemes])
