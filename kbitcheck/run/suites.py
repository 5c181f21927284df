"""Suites: the cases that a run consists of."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from kbitcheck.backends import registry
from kbitcheck.backends.quantization import DEFAULT, Quantization
from kbitcheck.core.cases import CaseSpec, Checkpointing
from kbitcheck.core.compositions import COMPOSITIONS, Composition
from kbitcheck.core.conditions import ALL, FEW
from kbitcheck.core.errors import UsageError
from kbitcheck.core.profile import with_kept

# Model, quantization, checkpointing modes.
Cell: TypeAlias = tuple[str, str, Sequence[Checkpointing]]

QUICK: Sequence[Cell] = (
    # Untied, grouped-query, RMSNorm, the plain path in both quantizations; nested state, half-precision packed storage.
    ("tiny:llama", "nf4,double,storage=bf16", ("non-reentrant",)),
    ("tiny:llama", "int8", ("reentrant", "off")),
    # Several towers: adapters in the one that reads images, whose input comes from a convolution.
    ("tiny:llava", "fp4,compute=fp32", ("reentrant",)),
    # Encoder-decoder, several readers of one tensor, fp16 weights beside fp32 ones.
    ("tiny:t5", "nf4,storage=fp16,compute=fp32", ("reentrant",)),
    ("tiny:t5", "int8", ("non-reentrant",)),
    # Tied, LayerNorm and biases; float32 compute, where a two per cent slip cannot hide in rounding.
    ("tiny:gpt2", "nf4,compute=fp32", ("reentrant", "off")),
    ("tiny:gpt2", "int8", ("default",)),
)
RECIPES = (
    "bert", "gemma", "gpt-oss", "gpt2", "llama", "llava", "mixtral", "opt", "qwen3", "qwen3-moe", "t5", "whisper",
)  # fmt: skip
# What is put into several processes, trainers and the like: a small model of text alone.
COMPOSED: Sequence[Cell] = tuple(
    ("tiny:llama", quant, ("reentrant", "non-reentrant", "off")) for quant in ("nf4", "int8")
)
# The layers of recipes that have no Linear; a backend that replaces none of them leaves nothing quantized.
LAYERS = {"tiny:gpt2": "Conv1D"}
# Recipes of which each layer has a multiple of 8 rows.
EIGHTS = ("tiny:opt",)
# Deeper, wider and of more tokens than any threshold that somebody would write, in one case each: they are dear, and are Llamas.
LARGEST: Sequence[Cell] = (("tiny:deep", DEFAULT, ("reentrant",)), ("tiny:wide", DEFAULT, ("reentrant",)))
MODES: tuple[Checkpointing, ...] = ("reentrant", "non-reentrant", "off")


def suite_cells(suite: str) -> Sequence[Cell]:
    """The suite ``quick``, or ``full``: every recipe in every scheme of every available backend, and a deep and a wide model."""
    if suite != "full":
        return QUICK
    grid: list[tuple[str, Sequence[Checkpointing]]] = []
    for scheme in registry.run_here():
        if scheme == DEFAULT:
            grid.append((scheme, ("reentrant", "non-reentrant", "default", "off")))
            grid.append((f"{scheme},double,storage=bf16", ("non-reentrant",)))
        else:
            grid.append((scheme, MODES))
    cells = ((f"tiny:{recipe}", quant, modes) for recipe in RECIPES for quant, modes in grid)
    return [*(cell for cell in cells if fits(*cell[:2])), *LARGEST]


def suite_cases(
    suite: str, *, compositions: Sequence[Composition] = (), models: Sequence[str] = (), **how: Any
) -> list[CaseSpec]:
    """The cases of a suite by its name, narrowed as by ``cases``; with ``compositions`` these alone.

    The suite ``composition`` has all of them, and ``full`` has them for its own models.
    """
    if compositions or suite == "composition":
        return [
            replace(spec, composition=composition, adapters=spec.adapters.replace("reference", "peft"), conditions="")
            for spec in cases(COMPOSED, models=models, **how)
            for composition in compositions or COMPOSITIONS
        ]
    specs = cases(suite_cells(suite), models=models, **how)
    return specs if suite != "full" or models else [*specs, *suite_cases("composition", **how)]


def fits(model: str, quant: str) -> bool:
    """Whether a recipe has layers that the quantization's backend replaces."""
    backend = Quantization.parse(quant).backend
    return LAYERS.get(model, "Linear") in backend.replaces and (backend.rows == 1 or model in EIGHTS)


def cases(
    suite: Sequence[Cell],
    *,
    models: Sequence[str] = (),
    quants: Sequence[str] = (),
    checkpointing: Sequence[Checkpointing] = (),
    implementation: str,
    **options: Any,
) -> list[CaseSpec]:
    """The suite's cases, narrowed or replaced by what the user named.

    Naming models crosses them with the quantizations (nf4 and int8 by default) and modes named; naming only
    quantizations or modes crosses the suite's models with them, without models that a quantization leaves as they are;
    where it leaves all of them, with the recipes that it does not.
    Profile and freezing that are not set are the implementation's own. Cases of the whole quick suite share the
    conditions, others look at a few, those of the full suite at all, and those of no suite at none.
    """
    for name, value in (("models", models), ("quants", quants), ("checkpointing", checkpointing)):
        if isinstance(value, str):
            raise UsageError(f"{name} is a list, of one: [{value!r}]")
    if models or quants:
        cells = [
            (model, quant, checkpointing or MODES)
            for model in (models or dict.fromkeys(m for m, _, _ in suite))
            for quant in (quants or ("nf4", "int8"))
            if models or fits(model, quant)
        ]
        left = [quant for quant in quants if not models and quant not in {q for _, q, _ in cells}]
        others = [(f"tiny:{recipe}", quant) for recipe in RECIPES for quant in left if fits(f"tiny:{recipe}", quant)]
        cells += [(model, quant, checkpointing or MODES) for model, quant in others]
    else:
        cells = [(model, quant, checkpointing or modes) for model, quant, modes in suite]
    options = with_kept(options, implementation)
    specs = [
        CaseSpec(
            model=model,
            quant=str(Quantization.parse(quant)),
            checkpointing=mode,
            implementation=implementation,
            **options,
        )
        for model, quant, modes in cells
        for mode in modes
    ]
    specs = list(dict.fromkeys(specs))
    if not suite:
        return specs
    shared = suite is QUICK and not (models or quants or checkpointing)
    of_all = FEW if suite is QUICK else ALL
    return [
        replace(spec, conditions=spec.conditions or (f"{number}/{len(specs)}" if shared else of_all))
        for number, spec in enumerate(specs, 1)
    ]


def workers(specs: Sequence[CaseSpec]) -> int:
    """How many workers run at once where nobody says: one a core for recipes, else one, which may need all the memory."""
    if not all(spec.model.startswith("tiny:") for spec in specs):
        return 1
    # A container may have fewer cores than the machine; macOS cannot tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
