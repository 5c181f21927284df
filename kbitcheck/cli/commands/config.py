"""``kbitcheck config``."""

import json
from dataclasses import dataclass
from typing import Any

from kbitcheck.cli.options import argument, choice, option
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_CONFORMS
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.report.output_file import OutputFile
from kbitcheck.run.configuration import KEYS, OWN_FILE, SHARED_FILE, TABLE, Configuration, read, schema


@dataclass(frozen=True, kw_only=True)
class Options:
    key: str = argument("[KEY]", "Print the value of this key alone.", default="", nargs="?")
    format: str = choice("How to print the values.", "text", ("text", "json"))
    schema: bool = option("Print the JSON Schema of the file, for editors.", False)
    debug: bool = option("Show tracebacks.", False)


def run(options: Options) -> int:
    """Print what holds in this directory, and where each value comes from."""
    output = OutputFile("")
    if options.schema:
        output.write(_json(schema()))
        return EXIT_CONFORMS
    if options.key and options.key not in KEYS:
        hint = did_you_mean(options.key, KEYS) or f"; use {', '.join(KEYS)}"
        raise UsageError(f"no such key: {options.key}{hint}")
    configuration = read()
    if options.key:
        value = configuration.get(options.key)
        text = _json(value) if options.format == "json" else f"{'' if value is None else _text(value)}\n"
    elif options.format == "json":
        settings = configuration.settings.items()
        text = _json({key: {"value": setting.value, "from": setting.origin} for key, setting in settings})
    else:
        text = table(configuration)
    output.write(text)
    return EXIT_CONFORMS


def table(configuration: Configuration) -> str:
    """Each key with its value and the file that it comes from; without one, how to begin."""
    if not configuration:
        return f"no configuration: neither {OWN_FILE} nor {TABLE} in {SHARED_FILE}, here or above; write one with `kbitcheck init`\n"
    rows = [
        (key, _text(configuration[key]), configuration.settings[key].origin)
        if key in configuration
        else (key, "", "not set")
        for key in KEYS
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "".join(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}\n" for key, value, origin in rows)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{code}: {reason}" for code, reason in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
