"""The table of quantization methods as text, Markdown or JSON."""

import json

from kbitcheck.core.methods import Method, Methods
from kbitcheck.report.parts.markup import code, html, table
from kbitcheck.report.tables import aligned

HEAD = ("method", "trainable", "PEFT's function", "kbitcheck", "loads here")
FORMATS = ("text", "json", "markdown")
PAGE = """# Quantization methods

Every quantization method that the installed transformers lists, as `kbitcheck backends --format markdown` writes it.

* *trainable* is transformers' own word: `is_trainable` of the method's quantizer.
* *PEFT's function* is what `prepare_model_for_kbit_training` does with a model that is marked as of this method. It decides by the method's
  name: what it does not know is cast to float32, and checkpointing is left off without a warning.
* *kbitcheck* is the most that it does: a *full* audit; a *static* one, with the sizes that the checkpoint's own weights have; or a
  static one with sizes as if nf4 had quantized the model.
* *loads here* is what transformers says on this machine of a checkpoint that is quantized so.
"""


def render(methods: Methods, form: str) -> str:
    """The table in one of ``FORMATS``."""
    if form == "json":
        return json.dumps(methods.as_json(), indent=1) + "\n"
    versions = ", ".join(f"{name} {version}" for name, version in methods.versions.items())
    if form == "markdown":
        rows = [[code(row.loading.method), *map(html, _cells(row))] for row in methods.rows]
        return "\n".join([PAGE, f"With {versions}:", "", *table(HEAD, rows)]) + "\n"
    lines = aligned([HEAD, *([row.loading.method, *_cells(row)] for row in methods.rows)])
    return "\n".join([*lines, "", versions]) + "\n"


def _cells(row: Method) -> list[str]:
    treatment = "PEFT is not installed" if row.treatment is None else str(row.treatment)
    audit = ": ".join(filter(None, (row.audit, ", ".join(row.schemes))))
    return [row.loading.trainable, treatment, f"{audit} ({row.why})" if row.why else audit, row.loading.summary]
