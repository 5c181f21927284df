"""The command that runs one case and rule again."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from kbitcheck.core.cases import MODEL_RANK, CaseSpec
from kbitcheck.core.conditions import PROCESSES
from kbitcheck.core.memory_sizes import GIB
from kbitcheck.core.report import Report

DEFAULTS = {f.name: f.default for f in dataclasses.fields(CaseSpec)}
LATER_USE = "KB515"  # its places begin with the condition that they show under
IN_PROCESSES = ("KB213", "KB514")
NAMED = ("model", "quant", "implementation", "checkpointing", "static", "gpu", "conditions")


def command(report: Report, case: str, code: str = "") -> str:
    """A line to paste into a shell, or an empty string where no command can say it (a live model or callable)."""
    spec: Mapping[str, Any] | None = report.subject.get("cases", {}).get(case)
    kind = report.subject.get("command")
    if spec is None or kind not in ("model", "impl", "gate") or "<" in spec["implementation"]:
        return ""
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
    words += _condition(report, case) if code == LATER_USE else []
    words += ["--conditions", PROCESSES] if code in IN_PROCESSES else []
    return shlex.join(words)


def _condition(report: Report, case: str) -> list[str]:
    """The option that names the first condition under which the case fails."""
    failed = (f for result in report if (result.rule, result.case) == (LATER_USE, case) for f in result.failures)
    return next((["--conditions", failure.where.partition(":")[0]] for failure in failed), [])
