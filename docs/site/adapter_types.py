"""Write the table of adapter types and backends: ``python docs/site/adapter_types.py > docs/adapter-types.md``.

``python docs/site/adapter_types.py DoRA VeRA`` judges these types alone, and prints each cell.
"""

import dataclasses
import sys
import warnings
from collections.abc import Iterator, Mapping

import torch

from kbitcheck.backends import registry
from kbitcheck.core.adapters import NAMED, PREFIX
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.result import Status
from kbitcheck.core.rule import judge, select
from kbitcheck.models.load import quiet
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Loaded
from kbitcheck.run.subject import load

MODEL = "tiny:llama"
RULES = ("KB102", "KB103", "KB104", "KB105", "KB302", "KB304", "KB305", "KB307", "KB510", "KB803")
MORE: Mapping[str, Mapping[str, object]] = {
    "LoRA, dropout": {"peft_type": "LORA", "lora_dropout": 0.1},
    "LoRA, a head trained": {"peft_type": "LORA", "modules_to_save": ["lm_head"]},
    "LoRA, tokens trained": {"peft_type": "LORA", "trainable_token_indices": [1, 2, 5]},
}
HEAD = """# Adapter types and backends

Any configuration of PEFT's can be judged: `--adapters peft:DoRA` (a name of the table, in any case), or `--adapters adapter_config.json`, the
file that PEFT saves; in Python `check_implementation("peft", adapters=LoraConfig(use_dora=True))`. What it leaves open is filled with
`--targets`, `--rank` and twice the rank for `lora_alpha`. Steps are taken with other numbers than the start's, the same in every copy and in
the float64 twin: what starts at zero or at random is drawn, what starts elsewhere, as magnitudes and trained heads do, is stirred. KB803
judges the start itself. Bytes are forecast as those of a plain LoRA.

Each cell is one case: a Llama of two blocks, quantized, prepared by PEFT and checkpointed (reentrant), with adapters of this type on every
quantized layer, judged by {rules}. *kept* means that no rule is broken: the adapters' gradients are those of the float64 twin, checkpointing
and dropout change none, they train, and they are saved. A rule in a cell is broken; what PEFT refuses, it says itself.

Written with {versions} by `python docs/site/adapter_types.py > docs/adapter-types.md`.
"""


def bases(schemes: list[str]) -> Iterator[tuple[str, Loaded]]:
    source = resolve(MODEL)
    source = dataclasses.replace(source, config={**source.config, "num_hidden_layers": 2})  # type: ignore[type-var, attr-defined]
    for scheme in schemes:
        yield scheme, Loaded.from_source(source, CaseSpec(model=MODEL, quant=scheme, implementation="peft"))


def cell(loaded: Loaded, scheme: str, adapters: str) -> tuple[str, list[str]]:
    """What the cell says, and a line for each rule that is broken or not judged."""
    prepare = load("peft").function
    spec = CaseSpec(
        model=MODEL, quant=scheme, implementation="peft", checkpointing="reentrant", adapters=adapters, cut="never"
    )
    case = Case(spec, prepare, loaded)
    try:
        results = [judge(rule, case) for rule in select(RULES)]
    except UsageError as error:
        return f"refused: {error.cause or str(error).rpartition(': ')[2]}", [str(error)]
    finally:
        case.close()
    notes = [f"{r.rule} {r.status.value}: {r.reason or r.failures[0]}" for r in results if r.status is not Status.PASS]
    broken = [r.rule for r in results if r.status in (Status.FAIL, Status.ERROR)]
    raised = [r.reason for r in results if r.status is Status.ERROR]
    if raised:
        return f"does not run: {raised[0]}", notes
    refused = next((r.reason for r in results if r.status is Status.SKIP and r.rule == "KB803"), "")
    refused = f"; {refused}" if "peft" in refused else ""
    return (", ".join(broken) or "kept") + refused, notes


def main(names: list[str]) -> None:
    import bitsandbytes
    import peft
    import transformers

    warnings.simplefilter("ignore")
    schemes = [scheme for scheme in registry.run_here() if scheme in ("nf4", "int8", "torchao-int8")]
    chosen = {name: PREFIX + name for name in NAMED if not names or name in names}
    import json

    chosen |= {n: PREFIX + json.dumps(f) for n, f in MORE.items() if not names or n in names}
    rows: dict[str, list[str]] = {name: [] for name in chosen}
    with quiet(), torch.compiler.set_stance("force_eager"):
        for scheme, loaded in bases(schemes):
            for name, adapters in chosen.items():
                text, notes = cell(loaded, scheme, adapters)
                rows[name].append(text)
                if names:
                    print(f"{name} × {scheme}: {text}", *notes, sep="\n    ", flush=True)
    if names:
        return
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (peft, transformers, bitsandbytes, torch))
    print(HEAD.format(rules=", ".join(RULES), versions=versions))
    print(f"| adapters | {' | '.join(schemes)} |", "|---" * (len(schemes) + 1) + "|", sep="\n")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(each.replace('|', '/') for each in cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
