"""Names what is under test: ``reference``, ``peft``, ``module:function`` or ``path/to/file.py:function``.

After ``REQUIREMENT::`` a module or file is that of another environment: see ``kbitcheck.run.requirements``.
"""

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from kbitcheck.core import machine
from kbitcheck.core.cases import REFERENCE, Implementation, Profile
from kbitcheck.core.errors import UsageError, cause
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.observe import library_attributes
from kbitcheck.run import module_names, requirements

ALIASES = {
    REFERENCE: "kbitcheck_reference:prepare_model_for_kbit_training",
    "peft": "peft:prepare_model_for_kbit_training",
}
FORMS = "reference, peft, trl, llamafactory, axolotl, swift, module:function, path/to/file.py:function or REQUIREMENT::module:function"

DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


class Missing(UsageError):
    """There is no such function, whatever else is installed."""


def default_profile(name: str) -> Profile:
    """The profile under which ``kbitcheck model`` judges: PEFT and the reference promise PEFT's recipe, others their own."""
    return "peft" if ":".join(_split(name)) in ALIASES.values() else "auto"


def default() -> str:
    """What ``kbitcheck model`` prepares with: peft where it is installed, else the reference."""
    return "peft" if importlib.util.find_spec("peft") else REFERENCE


def validate(text: str) -> None:
    """Check syntax, file and top-level module of what names an implementation, without importing or installing it."""
    requirement = requirements.parse(text)
    where, attribute = _split(text)
    if not where or not DOTTED.fullmatch(attribute):
        hint = did_you_mean(text, [*ALIASES, *requirements.TRAINERS])
        raise UsageError(f"implementation {text!r} names no function{hint}: write {FORMS}")
    if requirement is not None:
        requirement.validate()
    if _is_file(where):
        if not Path(where).is_file():
            raise UsageError(f"implementation {text!r}: no such file: {where}")
    elif not DOTTED.fullmatch(where):
        raise UsageError(f"implementation {text!r} is not one of {FORMS}")
    elif requirement is None:
        top, path = where.partition(".")[0], [str(Path.cwd()), *sys.path]
        if top not in sys.modules and PathFinder.find_spec(top, path) is None:
            if text == "peft":
                raise UsageError("peft is not installed: pip install 'kbitcheck[peft]'")
            hint = did_you_mean(top, _modules(path))
            raise UsageError(
                f"implementation {text!r}: no module named {top!r} is installed or in this directory{hint}"
            )
        _require_names(text, where, attribute.partition(".")[0], path)


def _require_names(text: str, where: str, name: str, path: list[str]) -> None:
    """Raise ``Missing`` for a module, or a name in it, that is not there as far as the sources tell."""
    if where in sys.modules:
        return
    if absent := module_names.absent_module(where, path):
        module, beside = absent
        hint = did_you_mean(module.rpartition(".")[2], _modules(beside))
        raise Missing(f"implementation {text!r}: no module named {module!r}{hint}")
    names = module_names.names_of(where, path)
    if names is not None and name not in names:
        raise Missing(f"implementation {text!r}: {where} has no attribute {name!r}{did_you_mean(name, sorted(names))}")


def load(text: str) -> Implementation:
    """Import the implementation. Run this only where the harness and its oracle are already imported.

    ``Missing`` is for a module or callable that is not there, another ``UsageError`` for an import that fails.
    """
    from kbitcheck.observe.probes import process_state

    validate(text)
    where, attribute = _split(text)
    before, libraries = process_state.state(), library_attributes.attributes()
    try:
        module = _load_file(Path(where)) if _is_file(where) else _import(where, text)
    except (Exception, SystemExit) as error:
        why = f" cannot be imported: {cause(error)}"
        if not isinstance(error, ModuleNotFoundError) or not f"{where}.".startswith(f"{error.name}."):
            raise UsageError(f"implementation {text!r}{why}") from error
        if error.msg == f"No module named {error.name!r}":  # else a package may give advice of its own
            parent, _, name = str(error.name).rpartition(".")
            hint = did_you_mean(name, _modules(getattr(sys.modules.get(parent), "__path__", ())))
            why = f": no module named {error.name!r}{hint}"
        raise Missing(f"implementation {text!r}{why}") from error
    function: Any = module
    for name in attribute.split("."):
        try:
            function = getattr(function, name)
        except AttributeError:
            hint = did_you_mean(name, dir(function))
            raise Missing(f"implementation {text!r}: {where} has no attribute {attribute!r}{hint}") from None
    if not callable(function):
        raise Missing(f"implementation {text!r} is a {type(function).__name__}, which cannot be called")
    subject = describe(function, name=text, version=_version(module, text))
    changed = process_state.changed(before, process_state.state())
    settings = {name: values for name, values in changed.items() if name not in process_state.AT_IMPORT}
    return replace(subject, imported=settings | library_attributes.replaced_at_import(libraries))


def unused(text: str) -> Implementation:
    """The name of an implementation that a static audit never calls, and so need not import."""

    def never(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{text} was not loaded")

    return Implementation(name=text, function=never)


def describe(function: Callable[..., Any], *, name: str = "", version: str = "") -> Implementation:
    """The implementation a callable is: looks through partials, wrappers and callable instances for its source."""
    bare: Any = function
    while isinstance(bare, functools.partial):
        bare = bare.func
    bare = inspect.unwrap(bare)
    if not inspect.isroutine(bare) and not inspect.isclass(bare):
        bare = type(bare).__call__
    code = getattr(bare, "__code__", None)
    return Implementation(
        name=name or getattr(bare, "__qualname__", type(function).__qualname__),
        function=function,
        version=version,
        file=code.co_filename if code else "",
        line=code.co_firstlineno if code else 0,
    )


def _split(text: str) -> tuple[str, str]:
    requirement = requirements.parse(text)
    where, _, attribute = (ALIASES.get(text, text) if requirement is None else requirement.function).rpartition(":")
    return where, attribute


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where


def _import(name: str, text: str) -> ModuleType:
    if (requirement := requirements.parse(text)) is not None:
        # Before PYTHONPATH, which may hold another state of the same package.
        packages = sysconfig.get_path("purelib")
        if not Path(packages, requirements.PARENT).exists():
            raise ImportError(f"{requirement.text} has an environment of its own, and cannot be loaded in this process")
        sys.path.insert(0, packages)
    elif text not in ALIASES:
        _first_on_path(Path.cwd())
    return importlib.import_module(name)


def _modules(path: Iterable[str]) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(list(path))]


def _load_file(path: Path) -> ModuleType:
    path = path.resolve()
    _first_on_path(Path.cwd())
    _first_on_path(path.parent)
    # A file named like an imported module (types.py, peft.py) must not take its place.
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"kbitcheck_subject_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is not a Python source file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _first_on_path(directory: Path) -> None:
    """Import from ``directory`` first, as a script there would, and leave no ``__pycache__`` behind in it."""
    sys.dont_write_bytecode = True
    if str(directory) not in sys.path[:1]:
        sys.path.insert(0, str(directory))


def _version(module: ModuleType, text: str) -> str:
    requirement = requirements.parse(text)
    if requirement is not None and requirement.function in {t.function for t in requirements.TRAINERS.values()}:
        return machine.version(requirement.project)
    top = module.__name__.partition(".")[0]
    version = machine.version("kbitcheck" if top == "kbitcheck_reference" else top)
    own = getattr(module, "__version__", "")
    return version or (own if isinstance(own, str) else "")
