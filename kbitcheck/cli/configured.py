"""The options of a command: those that were typed, and of the configuration what they leave out."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from kbitcheck.cli.options import RunOptions
from kbitcheck.run.configuration import Configuration, read

Options = TypeVar("Options", bound=RunOptions)

# What is typed for one option takes the place of what the file has for others, too.
REPLACED = {"suite": ("model", "quant", "checkpointing"), "against": ("ledger",)}


def configured(kind: type[Options], typed: Mapping[str, Any]) -> Options:
    """The options of a command that runs cases, of which these were typed."""
    return kind(**{**of_file(kind, typed, read()), **typed})


def of_file(kind: type[Any], typed: Mapping[str, Any], configuration: Configuration) -> dict[str, Any]:
    """The values of the options that the configuration decides."""
    replaced = {name for option in typed for name in (*REPLACED.get(option, ()), option)}
    keys = {each.name: each.metadata.get("key", "") for each in fields(kind) if each.name not in replaced}
    values = {name: configuration[key] for name, key in keys.items() if key in configuration}
    if "ignore" in values:
        values["ignore"] = [f"{code}={reason}" for code, reason in values["ignore"].items()]
    if "ledger" in values:
        values["ledger"] = configuration.ledger_of(str(typed.get("impl") or configuration.get("implementation", "")))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
