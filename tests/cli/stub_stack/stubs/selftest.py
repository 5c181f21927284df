"""Sabotages that are caught, but for KB901's; KB102's cannot be tried here, and KB201's ends the worker."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from kbitcheck.core.events import FaultTried


def run(codes: Sequence[str], *, matrix: bool = False) -> Iterator[FaultTried]:
    for code in codes:
        if code == "KB201":
            os._exit(9)
        caught = None if code == "KB102" else code != "KB901"
        yield FaultTried(code=code, fault="spoil", case="case", caught=caught, reason="why")
