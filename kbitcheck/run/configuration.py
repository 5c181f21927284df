"""The configuration: ``kbitcheck.toml``, or ``[tool.kbitcheck]`` in ``pyproject.toml``, of the nearest folder that has one."""

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.adapters import as_text
from kbitcheck.core.cases import REFERENCE, Checkpointing, Profile
from kbitcheck.core.errors import UsageError
from kbitcheck.core.rule import select
from kbitcheck.core.suggest import did_you_mean

BYTE_ORDER_MARK = "\ufeff"
OWN_FILE, SHARED_FILE, TABLE = "kbitcheck.toml", "pyproject.toml", "[tool.kbitcheck]"

Schema = Mapping[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
TEXTS: Schema = {"type": "array", "items": TEXT}


def _one_of(values: Any) -> Schema:
    return {"enum": [*get_args(values)]}


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the file: what it means, and its values as JSON Schema."""

    meaning: str
    values: Schema


KEYS = {
    "implementation": Key("The preparation that is judged: module:function, path/to/file.py:function or peft.", TEXT),
    "models": Key("The models, in place of the suite's.", TEXTS),
    "quants": Key("The quantizations, such as nf4, int8 or nf4,double.", TEXTS),
    "checkpointing": Key("Gradient checkpointing.", {"type": "array", "items": _one_of(Checkpointing)}),
    "profile": Key("The dtypes that the preparation promises.", _one_of(Profile)),
    "select": Key("Only these rules; prefixes (KB3) too.", TEXTS),
    "ignore": Key(
        "Rules that are left out: the reason by code or prefix.", {"type": "object", "additionalProperties": TEXT}
    ),
    "strict": Key("Whether a broken SHOULD counts as well.", {"type": "boolean"}),
    "ledger": Key("The accepted results, a path relative to this file.", TEXT),
    "timeout": Key("Time limit of one case in seconds.", {"type": "number", "exclusiveMinimum": 0}),
    "jobs": Key("Workers at a time; 0: one for each core where all models are recipes.", {"type": "integer", "minimum": 0}),
    "adapters": Key("The adapters: reference, peft, peft:NAME or the JSON file of a configuration of PEFT's.", TEXT),
}  # fmt: skip


def origins(configuration: "Configuration", values: Mapping[str, tuple[str, Any]]) -> str:
    """Where values come from, in words: by key of the configuration, the option beside it and the value; empty values are left out."""
    by_origin: dict[str, list[str]] = {}
    for key, (option, value) in values.items():
        setting = configuration.settings.get(key)
        configured = setting is not None and [*value] == setting.value
        if value:
            by_origin.setdefault(f" of {setting.origin}" if setting and configured else "", []).append(
                key if configured else option
            )
    return " and ".join(", ".join(names) + origin for origin, names in by_origin.items())


def schema() -> dict[str, Any]:
    """The JSON Schema of ``kbitcheck.toml``, and of the table in ``pyproject.toml``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A kbitcheck configuration",
        "description": "The content of kbitcheck.toml, or of the table [tool.kbitcheck] in pyproject.toml.",
        "type": "object",
        "properties": {name: {"description": key.meaning, **key.values} for name, key in KEYS.items()},
        "additionalProperties": False,
    }


@dataclass(frozen=True, slots=True)
class Setting:
    """A value, and the file that it comes from."""

    value: Any
    file: Path

    @property
    def origin(self) -> str:
        """The file in words, relative to the working directory."""
        name = os.path.relpath(self.file)
        return f"{name} {TABLE}" if self.file.name == SHARED_FILE else name


@dataclass(frozen=True, slots=True)
class Configuration(Mapping[str, Any]):
    """The values by key. Paths are relative to the working directory."""

    settings: Mapping[str, Setting] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.settings[key].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)

    def ledger_of(self, implementation: str) -> str:
        """The ledger; empty where the file names another implementation, whose results it holds."""
        same = self.get("implementation", implementation) == implementation
        return str(self.get("ledger", "")) if same else ""


def read(folder: Path | None = None) -> Configuration:
    """The configuration that holds in a folder (by default the working directory); empty without a file.

    Raises:
        UsageError: a file cannot be read, or has a key or value that does not exist; one line that names the file.
    """
    folder = Path.cwd() if folder is None else folder.resolve()
    for parent in (folder, *folder.parents):
        settings: dict[str, Setting] = {}
        for path, table in _tables(parent):
            values = _checked(path, table)
            settings |= {key: Setting(_from(parent, key, value), path) for key, value in values.items()}
        if settings:
            return Configuration({key: settings[key] for key in KEYS if key in settings})
    return Configuration()


def subject_of(configuration: Configuration) -> dict[str, list[str]]:
    """What a report says of it: its keys, which a command has to name to be the same elsewhere."""
    return {"configured": [*configuration]} if configuration else {}


def _tables(folder: Path) -> Iterator[tuple[Path, Any]]:
    """The tables of a folder's files; a value of a later one replaces that of an earlier one."""
    shared, own = folder / SHARED_FILE, folder / OWN_FILE
    if shared.is_file() and "kbitcheck" in (text := _text(shared)):
        tool = _toml(shared, text).get("tool", {})
        if isinstance(tool, dict) and "kbitcheck" in tool:
            yield shared, tool["kbitcheck"]
    if own.exists() or own.is_symlink():
        yield own, _toml(own, _text(own))


def _text(path: Path) -> str:
    if path.is_fifo() or path.is_socket() or path.is_char_device():  # which would be waited for
        raise UsageError(f"cannot read {os.path.relpath(path)}: it is no file")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {os.path.relpath(path)}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read {os.path.relpath(path)}: byte {error.start} is not UTF-8") from None


def _toml(path: Path, text: str) -> dict[str, Any]:
    if text.startswith(BYTE_ORDER_MARK):
        raise UsageError(
            f"{os.path.relpath(path)} begins with a byte order mark, which TOML has not: save it as UTF-8 without one"
        )
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{os.path.relpath(path)} is not TOML: {error}") from None


def _checked(path: Path, table: Any) -> Mapping[str, Any]:
    """The table itself, where every key and value exists."""
    where = os.path.relpath(path) + (f" {TABLE}" if path.name == SHARED_FILE else "")
    if not isinstance(table, dict):
        raise UsageError(f"{where} is no table, but {_shown(table)}")
    for name, value in table.items():
        if name not in KEYS:
            hint = did_you_mean(name, KEYS) or f"; use {', '.join(KEYS)}"
            if name in ("tool", "kbitcheck") and isinstance(value, dict):
                hint = f": here keys stand without a table; {TABLE} is that of {SHARED_FILE}"
            raise UsageError(f"{where}: no such key: {name}{hint}")
        for problem in _problems(KEYS[name].values, value, name):
            raise UsageError(f"{where}: {problem}")
    checks: tuple[Callable[[], Any], ...] = (
        lambda: select(table.get("select", ())),
        lambda: select((), table.get("ignore", {})),
        lambda: [Quantization.parse(quant) for quant in table.get("quants", ())],
        lambda: as_text(_from(path.parent, "adapters", table.get("adapters", REFERENCE))),
    )
    for check in checks:
        try:
            check()
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
    return table


def _problems(values: Schema, value: Any, name: str) -> Iterator[str]:
    """What is wrong with a value, by the parts of JSON Schema that ``KEYS`` uses."""
    if "enum" in values:
        if value not in values["enum"]:
            hint = did_you_mean(value, values["enum"]) if isinstance(value, str) else ""
            yield f"no such {name}: {_shown(value)}{hint}; use {', '.join(values['enum'])}"
        return
    python_types, wanted = TYPES[values["type"]]
    if type(value) not in python_types or not _in_range(values, value):
        yield f"{name} {wanted}, not {_shown(value)}" + (f": [{_shown(value)}]" if wanted == "is a list" else "")
    elif isinstance(value, list):
        for each in value:
            yield from _problems(values["items"], each, name)
    elif isinstance(value, dict):
        for code, reason in value.items():
            if not isinstance(reason, str) or not reason.strip():
                yield f"{name} wants a reason for {code}, not {_shown(reason)}: say why it is left out"


TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "array": ((list,), "is a list"),
    "object": ((dict,), "is a table of codes to reasons"),
    "boolean": ((bool,), "is true or false"),
    "string": ((str,), "wants a text"),
    "integer": ((int,), "wants a whole number of at least 0"),
    "number": ((int, float), "wants a number of seconds above 0"),
}


def _in_range(values: Schema, value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if not isinstance(value, int | float):
        return True
    return bool(values.get("minimum", value) <= value < float("inf") and value > values.get("exclusiveMinimum", -1))


def _shown(value: Any) -> str:
    """A value as TOML has it; of a list or a table the kind alone."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return "a table" if isinstance(value, dict) else "a list" if isinstance(value, list) else str(value)


def _from(folder: Path, key: str, value: Any) -> Any:
    """A value whose paths, which are relative to ``folder``, are relative to the working directory."""
    if folder == Path.cwd():
        return value
    if key == "ledger" or (key == "adapters" and value.endswith(".json")):
        return os.path.relpath(folder / value)
    if key == "models":
        return [os.path.relpath(folder / model) if (folder / model).exists() else model for model in value]
    if key == "implementation":
        where, _, attribute = value.rpartition(":")
        if where.endswith(".py"):
            return f"{os.path.relpath(folder / where)}:{attribute}"
    return value
