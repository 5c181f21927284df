"""The table of quantization methods: what transformers, PEFT and kbitcheck do with each on this machine."""

import importlib.metadata
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from kbitcheck.backends import registry
from kbitcheck.core.methods import Method, Methods

FULL = "full"
ON_LOAD = "full if quantized on load, static of checkpoints"
NAMED = "static, sizes as of nf4"
PACKAGES = ("torch", "transformers", "peft")


def methods() -> Methods:
    """A row for every quantization method that the installed transformers lists."""
    from kbitcheck.models import methods as of_transformers

    rows = [_row(config) for config in of_transformers.described().values()]
    return Methods(versions=dict(_versions()), rows=tuple(rows))


def _row(config: Mapping[str, Any]) -> Method:
    from kbitcheck.models.methods import loading
    from kbitcheck.observe.probes.treatment import peft_function, treatment

    peft = peft_function()
    backend = registry.of_method(config)
    why = "kbitcheck has no backend for it" if backend is None else backend.unavailable() or backend.static_only
    missing = "" if backend is None else backend.not_on_load()
    static = "static" if backend is None or missing else ON_LOAD
    if backend is not None and why == backend.static_only and missing not in ("", why):
        why += f"; full if quantized on load, but {missing}"
    return Method(
        loading=loading(config),
        treatment=None if peft is None else treatment(peft, config),
        schemes=() if backend is None else tuple(scheme.name for scheme in backend.schemes),
        audit=FULL if not why else static if backend is not None and backend.static_only else NAMED,
        why=why,
    )


def _versions() -> dict[str, str]:
    installed = {}
    for name in (*PACKAGES, *(library for backend in registry.registered() for library in backend.libraries)):
        with suppress(ImportError):
            installed[name] = importlib.metadata.version(name)
    return installed
