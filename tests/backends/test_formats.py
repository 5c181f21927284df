"""Each built-in backend whose layers are run has its format in the oracle, under the same name, and the other way round."""

import pkgutil
from pathlib import Path

import kbitcheck_reference.formats as formats

import kbitcheck.backends
from kbitcheck.backends import registry
from kbitcheck.backends.protocol import Backend


def test_the_two_trees_pair() -> None:
    folders = {f.name for f in pkgutil.iter_modules([str(Path(kbitcheck.backends.__file__).parent)]) if f.ispkg}
    modules = {m.name for m in pkgutil.iter_modules([str(Path(formats.__file__).parent)])}
    computing = {b.name for b in registry.registered() if type(b).arithmetic is not Backend.arithmetic}
    assert computing <= modules <= folders


def test_each_format_has_what_the_registry_asks_of_it() -> None:
    for form in formats.registered():
        for name in ("PACKAGE", "packs", "holds", "unpack", "pack"):
            assert hasattr(form, name), (form, name)
