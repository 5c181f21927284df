"""How long passes of a model take on this machine, and how much memory: predicted from its sizes, before it is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import torch
from torch import nn
from xxhash import xxh3_128

from kbitcheck.core.anatomy import unquantized
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts import Cost, ModelFacts, ModuleFacts, Passes
from kbitcheck.core.machine import LARGE_BYTES
from kbitcheck.core.plan import Planner, facts_by_rule
from kbitcheck.core.rule import Rule
from kbitcheck.models.inputs.text import LENGTH, ROWS, SHORT
from kbitcheck.models.zoo.shrink import BLOCKS_OF_A_KIND
from kbitcheck.observe.forecast import fitting
from kbitcheck.observe.probes.layers import KEPT_BYTES
from kbitcheck.observe.static import promised_bytes

MILLION = 1e6
TOKENS = ROWS * LENGTH
# Times that a weight is copied, a byte a weight, while it is unpacked: by the library's kernels, and by the oracle to float64.
UNPACK, EXACT, EXACT_4BIT, QUANTIZE = 6, 10, 50, 500
WIDTH = 1024  # of the weight that is timed
# Small operators that a predicted step takes as long as, and for each quantized layer that runs.
PREDICTED, PREDICTED_LAYER = 4000, 1200


@dataclass(frozen=True, slots=True)
class Machine:
    """Seconds on this CPU, each the least of a few times.

    ``half``, ``single`` and ``double`` are products of ``TOKENS`` tokens with a million weights, ``copy`` and ``digest`` are of
    a million bytes, ``operator`` is a small layer's forward and backward.
    """

    half: float
    single: float
    double: float
    copy: float
    digest: float
    operator: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model: millions of quantized weights, of weights of other products, and of bytes before and after its preparation.

    ``layers`` is the number of quantized layers, ``kinds`` that in two blocks of each kind, ``packed`` the bytes of a quantized
    weight, ``steps`` how many times ``TOKENS`` tokens a batch has.
    """

    quantized: float
    others: float
    layers: int
    kinds: int
    packed: float
    loaded: float
    prepared: float
    steps: float

    @classmethod
    def of(cls, base: ModelFacts, spec: CaseSpec) -> Sizes:
        """Of a model as loaded, prepared under the spec's profile."""
        weights = sum(layer.in_features * layer.out_features for layer in base.layers.values())
        others = sum(
            prod(tensor.shape)
            for group, tensors in unquantized(base).items()
            for tensor in tensors
            if len(tensor.shape) > 1 and (group != "embeddings" or base.heads)  # heads may be tied to them
        )
        packed = {t.storage: t.nbytes for t in base.packed.values()}
        added = sum(promised_bytes(base, spec.profile).values())
        length = SHORT if base.nbytes > LARGE_BYTES and spec.device == "cpu" else LENGTH
        return cls(
            quantized=weights / MILLION,
            others=others / MILLION,
            layers=len(base.layers),
            kinds=len(_shortened(base).layers),
            packed=sum(packed.values()) / weights if weights else 0.0,
            loaded=base.nbytes / MILLION,
            prepared=(base.nbytes + added) / MILLION,
            steps=max((spec.batch or ROWS) * (spec.seq_len or length), ROWS * SHORT) / TOKENS,
        )


def planned(costs: Mapping[str, Cost], spec: CaseSpec, base: ModelFacts, rules: Sequence[Rule]) -> Planner:
    """Plans the case of a base that these rules judge. On an accelerator nothing is known of the products' speed."""
    large = base.nbytes > LARGE_BYTES
    cut = spec.cut == "always" or (spec.cut == "if-large" and large)
    whole, speed = Sizes.of(base, spec), machine()
    short = Sizes.of(_shortened(base), spec) if cut else whole
    if not cut:
        costs = {name: replace(cost, on="whole") if cost.on == "cut" else cost for name, cost in costs.items()}
    if spec.device != "cpu":
        speed = replace(speed, half=0.0, single=0.0, double=0.0, copy=0.0)
    return Planner(
        costs,
        facts_by_rule(rules, spec, base),
        seconds=lambda cost: seconds(cost.passes, short if cost.on == "cut" else whole, speed),
        nbytes=lambda cost: nbytes(cost, whole, short if cost.on == "cut" else whole),
        opening=opening(whole, speed),
    )


def forecast_alone(spec: CaseSpec, base: ModelFacts, rules: Sequence[Rule]) -> Planner:
    """Plans a case without weights, where nothing but the forecast takes time."""
    sizes, speed = Sizes.of(base, spec), machine()
    return Planner(
        {"forecast": fitting.cost(spec)},
        facts_by_rule(rules, spec, base),
        seconds=lambda cost: seconds(cost.passes, sizes, speed),
        nbytes=lambda cost: 0,
    )


def _shortened(base: ModelFacts) -> ModelFacts:
    """The base with the blocks alone that a cut keeps: the first of each tower, as many as hold each class of block twice."""
    towers: dict[str, list[ModuleFacts]] = {}
    for block in base.blocks:
        towers.setdefault(block.tower, []).append(block)
    dropped = tuple(
        f"{block.name}."
        for blocks in towers.values()
        for block in blocks[BLOCKS_OF_A_KIND * len({block.cls for block in blocks}) :]
    )
    return replace(
        base,
        parameters={name: each for name, each in base.parameters.items() if not name.startswith(dropped)},
        layers={name: each for name, each in base.layers.items() if not name.startswith(dropped)},
    )


def seconds(passes: Passes, sizes: Sizes, speed: Machine) -> float:
    """About what passes take on one thread.

    A pass takes what its products and the unpacking of weights take, and for each quantized layer, with its adapter, hooks and
    share of all else, the time of some small operators. The factors are fitted to a tiny and to a 135M model.
    """
    layer = sizes.layers * speed.operator
    unpack = UNPACK * sizes.quantized * speed.copy
    half = sizes.quantized * speed.half * sizes.steps
    others = sizes.others * speed.single * sizes.steps
    double = (sizes.quantized + sizes.others) * speed.double * sizes.steps
    exact = (EXACT_4BIT if sizes.packed < 1 else EXACT) * sizes.quantized * speed.copy
    if sizes.quantized * 8 * MILLION <= KEPT_BYTES:
        unpack, exact = unpack / 2, 0.0  # twins keep the weights that they unpacked
    return (
        passes.forwards * (12 * layer + unpack + half + others)
        + passes.backwards * (30 * layer + 8 * (unpack + half) + 2 * others)
        + passes.float64_forwards * (12 * layer + exact + double)
        + passes.float64_backwards * (20 * layer + exact + double)
        + passes.float64_products * (15 * layer + exact + 3 * double)
        + passes.copies * (10 * layer + 2 * sizes.prepared * speed.copy)
        + passes.calls * (15 * layer + 4 * sizes.prepared * speed.copy)
        + passes.snapshots * (12 * layer + 2 * sizes.prepared * speed.digest)
        + passes.predicted * (PREDICTED + PREDICTED_LAYER * sizes.kinds) * speed.operator
    )


def opening(sizes: Sizes, speed: Machine) -> float:
    """About what it takes to load, quantize and read a model."""
    reading = 2 * sizes.loaded * speed.digest + (EXACT_4BIT + UNPACK) * sizes.quantized * speed.copy
    return 100 * sizes.layers * speed.operator + reading + QUANTIZE * sizes.quantized * speed.copy


def nbytes(cost: Cost, base: Sizes, model: Sizes) -> int:
    """About the bytes at the peak: the base, and the models beside it; what a step of small batches holds is little."""
    models = 0 if cost.passes.predicted else max(cost.models, 1)
    return round(MILLION * (base.loaded + models * model.prepared))


@cache
def machine() -> Machine:
    """Timed on this CPU, once a process."""
    digested, copied = bytes(4 << 20), torch.zeros(1 << 22, dtype=torch.uint8)
    small = nn.Linear(8, 8)
    x = torch.ones(2, 8, requires_grad=True)
    return Machine(
        half=_product(torch.bfloat16),
        single=_product(torch.float32),
        double=_product(torch.float64),
        copy=_least(copied.clone) / (copied.nbytes / MILLION),
        digest=_least(lambda: xxh3_128(digested)) / (len(digested) / MILLION),
        operator=_least(lambda: small(x).sum().backward(), times=200),
    )


def _product(dtype: torch.dtype) -> float:
    x, weight = torch.ones(TOKENS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    return _least(lambda: nn.functional.linear(x, weight)) / (WIDTH * WIDTH / MILLION)


def _least(action: Callable[[], object], times: int = 5) -> float:
    took = []
    for _ in range(times):
        start = time.thread_time()  # not what other processes take
        action()
        took.append(time.thread_time() - start)
    return min(took)
