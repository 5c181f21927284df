"""Write the page of adapter types and backends.

``python docs/site/adapter_types.py`` judges every type on every scheme that runs here, or on those that are named, keeps what it saw in
``docs/adapter-types/SCHEME.json``, and makes ``docs/adapter-types.md`` of these files.
"""

import dataclasses
import json
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch

from kbitcheck.backends import registry
from kbitcheck.core.adapters import NAMED, PREFIX
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.profile import AS_LOADED
from kbitcheck.core.result import Status
from kbitcheck.core.rule import judge, select
from kbitcheck.models.load import quiet
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.recipe import promises_upcast
from kbitcheck.report.parts.limits import SHORT
from kbitcheck.run.subject import load

DATA = Path(__file__).parents[1] / "adapter-types"
PAGE = DATA.with_suffix(".md")
SCHEMES = ("nf4", "int8", "torchao-int8", "fp8", "hqq-int4", "gptq-int4")
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
and dropout change none, they train, and they are saved. A rule in a cell is broken, by whom stands in brackets; *refused* and *does not run*
are what PEFT raised. Defects behind them, with scripts, are among the [findings](findings.toml): [DoRA on int8](findings/peft_dora_int8_cpu.py),
[HRA on int8](findings/peft_hra_int8.py), [OLoRA on nf4](findings/peft_olora_requantizes.py), and [AdaLoRA's count of
ranks](findings/peft_adalora_ranknum.py), which is frozen here. FourierFT starts at random numbers by its own default. KB510 on fp8 and hqq-int4
is transformers', which does not save or load the base. There is no column of optimum-quanto's, as PEFT's function [raises on all of its
models](findings/peft_casts_quanto.py), of `awq-int4`, whose layers have more rows than this model's, nor of compressed-tensors, whose layers
are plain ones after their first forward.

Written with {versions} by `python docs/site/adapter_types.py`.
"""


def base(scheme: str) -> Loaded:
    source: Any = resolve(MODEL)
    source = dataclasses.replace(source, config={**source.config, "num_hidden_layers": 2})
    return Loaded.from_source(source, CaseSpec(model=MODEL, quant=scheme, implementation="peft"))


def cell(loaded: Loaded, scheme: str, adapters: str) -> str:
    prepare = load("peft").function
    spec = CaseSpec(
        model=MODEL, quant=scheme, implementation="peft", checkpointing="reentrant", adapters=adapters, cut="never",
        profile="peft" if promises_upcast(loaded.facts) else AS_LOADED,  # PEFT casts nothing around torchao's layers
    )  # fmt: skip
    case = Case(spec, prepare, loaded)
    try:
        results = [judge(rule, case) for rule in select(RULES)]
    except UsageError as error:
        return f"refused: {error.cause or str(error).rpartition(': ')[2]}"
    finally:
        case.close()
    if raised := [r.reason for r in results if r.status is Status.ERROR]:
        return f"does not run: {raised[0]}"
    words = [f"{r.rule} ({r.attributed_to.value})" for r in results if r.status is Status.FAIL and r.attributed_to]
    words = words or ["kept"]
    words += [f"{r.rule} not judged: {r.reason}" for r in results if r.status is Status.SKIP]
    return "; ".join(words)


def judge_all(scheme: str) -> None:
    """Judge every type on a scheme, and keep what was seen; a cell that these versions have is not judged again."""
    distributions = packages_distributions()
    own = [
        d for library in registry.of_scheme(scheme).libraries for d in distributions.get(library.partition(".")[0], ())
    ]
    packages = ("peft", "transformers", "bitsandbytes", "torch", *own)
    versions = {name: version(name) for name in dict.fromkeys(packages)}
    file = DATA / f"{scheme}.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    cells: dict[str, str] = before.get("cells", {}) if before.get("versions") == versions else {}
    for name, adapters in ({n: PREFIX + n for n in NAMED} | {n: json.dumps(f) for n, f in MORE.items()}).items():
        if name in cells:
            continue
        cells[name] = cell(base(scheme), scheme, adapters)  # a base of its own: no cell depends on another
        print(f"{name} on {scheme}: {cells[name]}", flush=True)
        text = json.dumps({"versions": versions, "cells": cells}, indent=1)
        file.write_text(text + "\n", encoding="utf-8")


def page() -> str:
    """The page, of the data that is there."""
    seen = {
        file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(DATA.glob("*.json"), reverse=True)
    }
    versions = ", ".join(dict.fromkeys(f"{n} {v}" for each in seen.values() for n, v in each["versions"].items()))
    lines = [HEAD.format(rules=", ".join(RULES), versions=versions)]
    lines += [f"| adapters | {' | '.join(seen)} |", "|---" * (len(seen) + 1) + "|"]
    names = dict.fromkeys(name for each in seen.values() for name in each["cells"])
    for name in names:
        cells = [SHORT.text(each["cells"].get(name, "not tried")).replace("|", "/") for each in seen.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(schemes: list[str]) -> None:
    warnings.simplefilter("ignore")
    DATA.mkdir(exist_ok=True)
    with quiet(), torch.compiler.set_stance("force_eager"):
        for scheme in schemes or [s for s in registry.run_here() if s in SCHEMES]:
            judge_all(scheme)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
