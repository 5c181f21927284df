"""Each built-in backend whose layers are run has its format in the oracle, under the same name, and the other way round."""

import pkgutil
from pathlib import Path

import kbitcheck_reference.formats as formats

import kbitcheck.backends
from kbitcheck.backends import registry


def test_the_two_trees_pair() -> None:
    folders = {f.name for f in pkgutil.iter_modules([str(Path(kbitcheck.backends.__file__).parent)]) if f.ispkg}
    folders -= {backend.name for backend in registry.registered() if backend.static_only}
    modules = {m.name for m in pkgutil.iter_modules([str(Path(formats.__file__).parent)])}
    assert folders == modules


def test_each_format_has_what_the_registry_asks_of_it() -> None:
    for form in formats.registered():
        for name in ("PACKAGE", "packs", "holds", "unpack", "pack"):
            assert hasattr(form, name), (form, name)
