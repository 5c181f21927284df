"""Which functions of a project look like a preparation, read off its sources without importing them."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

from kbitcheck.core.errors import UsageError
from kbitcheck.run.subject import validate

PEFTS_NAME = "prepare_model_for_kbit_training"
PEFTS_PARAMETER = "use_gradient_checkpointing"
LEFT_OUT = ("tests", "test", "docs", "build", "dist", "node_modules", "site-packages")


def candidates(folder: Path) -> list[str]:
    """The names of a project's preparations: of functions with PEFT's name, or if there is none with PEFT's parameter."""
    named, similar = [], []
    for path in _sources(folder):
        for function in _functions(path):
            parameters = [each.arg for each in (*function.args.args, *function.args.kwonlyargs)]
            if function.name == PEFTS_NAME and parameters:
                named.append(_name(folder, path, function.name))
            elif PEFTS_PARAMETER in parameters and parameters[0] != PEFTS_PARAMETER:
                similar.append(_name(folder, path, function.name))
    return named or similar


def _sources(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in LEFT_OUT and not Path(where, name, "pyvenv.cfg").exists()
        )
        yield from (
            Path(where, name) for name in sorted(files) if name.endswith(".py") and not name.startswith("test_")
        )


def _functions(path: Path) -> Iterator[ast.FunctionDef]:
    try:
        text = path.read_text(encoding="utf-8")
        if PEFTS_NAME in text or PEFTS_PARAMETER in text:
            yield from (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    except (OSError, ValueError, SyntaxError):
        return


def _name(folder: Path, path: Path, function: str) -> str:
    """``package.module:function`` where that can be imported from here, else ``path/to/file.py:function``."""
    parts = [*path.relative_to(folder).with_suffix("").parts]
    parts = parts[1:] if parts[0] == "src" else parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    name = f"{'.'.join(parts)}:{function}"
    try:
        validate(name)
    except UsageError:
        return f"{path.relative_to(folder).as_posix()}:{function}"
    return name
