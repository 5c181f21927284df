"""The command that runs one case and rule again."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from kbitcheck.core.cases import MODEL_RANK, REFERENCE, CaseSpec
from kbitcheck.core.conditions import PROCESSES, share
from kbitcheck.core.memory_sizes import GIB
from kbitcheck.core.report import Report

DEFAULTS = {f.name: f.default for f in dataclasses.fields(CaseSpec)}
LATER_USE = "KB515"  # its places begin with the condition that they show under
IN_PROCESSES = ("KB213", "KB514")
DRAWN_BY_TURNS = "KB310"  # its batch and adapters hang on the share of its suite that the case has
BY_NAME = (REFERENCE, "peft")  # what a command knows by one word, of what runs in this process
NAMED = ("model", "quant", "implementation", "checkpointing", "static", "gpu", "conditions")


def command(report: Report, case: str, code: str = "") -> str:
    """A line to paste into a shell, or an empty string where no command can say it (a live model or callable).

    Of a function that no other process can import, such as a notebook's, it is a line of Python.
    """
    spec: Mapping[str, Any] | None = report.subject.get("cases", {}).get(case)
    kind = report.subject.get("command")
    if spec is None or kind not in ("model", "impl", "gate") or "<" in spec["implementation"]:
        return ""
    if report.subject.get("in_process") and ":" not in spec["implementation"] and spec["implementation"] not in BY_NAME:
        return _call(spec, code, _condition(report, case, code))
    words = ["kbitcheck", "model" if kind == "model" else "impl"]
    if kind == "model":
        words += [spec["model"], "--prepare", spec["implementation"], "--quant", spec["quant"]]
    else:
        words += [spec["implementation"], "--model", spec["model"], "--quant", spec["quant"]]
    configured = report.subject.get("configured", ())  # at its default, too, a value may not be the configuration's
    if kind != "model" or spec["checkpointing"] != "default" or "checkpointing" in configured:
        words += ["--checkpointing", spec["checkpointing"]]
    defaults = {**DEFAULTS, "rank": MODEL_RANK} if kind == "model" else DEFAULTS
    for name, default in defaults.items():
        value = spec.get(name, default)
        if name in NAMED or (name, value) == ("device", "auto") or (value == default and name not in configured):
            continue
        if name == "memory":
            value = spec.get("gpu") or (f"{value // GIB}GiB" if value % GIB == 0 else value)
        option = "--" + name.replace("_", "-")
        words += [option] if value is True else [option, str(value)]
    words += ["--static"] if spec.get("static") == "always" else []
    words += ["--in-process"] if report.subject.get("in_process") else []
    words += ["--select", code] if code else []
    condition = _condition(report, case, code)
    words += ["--conditions", condition] if condition else []
    return shlex.join(words)


def _condition(report: Report, case: str, code: str) -> str:
    """The condition that the rule needs: for a later use, the first under which the case fails."""
    if code in IN_PROCESSES:
        return PROCESSES
    if code == DRAWN_BY_TURNS:
        own: str = report.subject["cases"][case].get("conditions", "")
        return own if share(own) else ""
    failed = (f for result in report if (result.rule, result.case) == (code, case) for f in result.failures)
    return next((f.where.partition(":")[0] for f in failed), "") if code == LATER_USE else ""


def _call(spec: Mapping[str, Any], code: str, condition: str) -> str:
    """The line of Python that does so."""
    arguments: dict[str, Any] = {f"{name}s": [spec[name]] for name in ("model", "quant")}
    arguments["checkpointing"] = [spec["checkpointing"]]
    for name in (name for name in DEFAULTS if name not in NAMED):
        if spec.get(name, DEFAULTS[name]) not in (DEFAULTS[name], "auto"):
            arguments[name] = spec[name]
    arguments |= {"conditions": condition} if condition else {}
    arguments |= {"select": [code]} if code else {}
    words = [spec["implementation"], *(f"{name}={value!r}" for name, value in arguments.items())]
    return f"kbitcheck.check_implementation({', '.join(words)})"
