"""Cases as a test module writes them."""

from collections.abc import Mapping
from typing import Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.rule import Rule
from kbitcheck.run.importable import importable_name


def as_spec(case: CaseSpec | Mapping[str, Any], **defaults: Any) -> CaseSpec:
    """A case from its fields, and ``defaults`` for fields that it leaves out.

    Raises:
        UsageError: a field is unknown or missing.
    """
    if isinstance(case, CaseSpec):
        return case
    fields = {"quant": "nf4", **defaults, **case}
    fields["implementation"] = importable_name(fields.get("implementation") or "")
    try:
        return CaseSpec(**{**fields, "quant": str(Quantization.parse(fields["quant"]))})
    except TypeError as error:
        raise UsageError(f"not a case: {error}") from None


def item_name(rule: Rule, spec: CaseSpec) -> str:
    """``KB303-layer-backward-exact[tiny:llama-nf4-reentrant]``."""
    return f"{rule.code}-{rule.name}[{spec.id}]"
