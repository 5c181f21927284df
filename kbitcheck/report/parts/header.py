"""What a report is about, on one line."""

from collections.abc import Mapping
from typing import Any

from kbitcheck.core.report import Report
from kbitcheck.report.parts.units import quantized_share, scaled


def header(report: Report) -> str:
    """Tool, model with its size, quantization, implementation and device, as far as the report says them."""
    subject, environment = report.subject, report.environment
    name, version = (subject.get("implementation", {}).get(key, "") for key in ("name", "version"))
    by = name if version in name else f"{name} {version}"  # a requirement names its own version
    specs: Mapping[str, Mapping[str, Any]] = subject.get("cases", {})
    facts: Mapping[str, Mapping[str, Any]] = report.facts.get("cases", {})
    shares = subject.get("command") in ("model", "audit")
    models = list(
        dict.fromkeys(_model(spec["model"], facts.get(case, {}), share=shares) for case, spec in specs.items())
    )
    quants = dict.fromkeys(spec["quant"] for spec in specs.values())
    static = next((f["static"] for f in facts.values() if "static" in f), "")
    adapters = [f["adapter"]["method"] for f in facts.values() if "adapter" in f]
    parts = [
        report.tool,
        models[0] if len(models) == 1 else f"{len(models)} models",
        " and ".join(quants) if len(specs) < 4 else f"{len(specs)} cases",
        f"static audit: {static}" if static else "" if adapters else f"prepared by {by or '?'}",
        " and ".join(dict.fromkeys(f"{method} adapter" for method in adapters)),
        "" if static else f"{environment.get('device', '')} {environment.get('device_name', '')}".strip(),
        " and ".join(dict.fromkeys(f["recipe"] for f in facts.values() if "recipe" in f)),
        "in this process" if subject.get("in_process") and not adapters else "",
    ]
    return " · ".join(filter(None, parts))


def _model(model: str, facts: Mapping[str, Any], *, share: bool) -> str:
    """The model's name with its class and size, and its quantized share if ``share``, as far as the facts say them."""
    size = facts.get("parameters")
    number = scaled(size, ("", "K", "M", "B", "T")).rstrip() if size else ""
    quantized = quantized_share(facts) if share else None
    about = ", ".join(filter(None, [facts.get("model_class", ""), number, quantized.text if quantized else ""]))
    return f"{model} ({about})" if about else model
