"""Adapters for a case: the reference's LoRA or PEFT's, on the same layers and with the same drawn numbers."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from kbitcheck_reference import lora
from torch import nn

from kbitcheck import backends
from kbitcheck.core.cases import ALL_LINEAR
from kbitcheck.core.errors import UsageError
from kbitcheck.models.parametrized import deep_copy
from kbitcheck.observe.probes import routers
from kbitcheck.observe.probes.snapshot import heads

# Of each factor of a pair: an adapter then moves its layer by about a fifth. At 1 it would outweigh the layer, and the
# sharp attention that gives (T5's most of all) makes gradients so rough that no comparison says anything.
SPREAD = 0.3

STATE_SPACE = re.compile(r"mamba|ssm", re.IGNORECASE)
HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "qa_outputs", "proj_out"})


def target_layers(model: nn.Module, targets: str) -> list[str]:
    """Names of the quantized layers and stacks of experts that get an adapter: all but the head, or those that ``targets`` names.

    Raises:
        UsageError: nothing matches.
    """
    head_ids = {id(h) for h in heads(model)}
    quantized = [
        name
        for name, module in model.named_modules()
        if backends.is_quantized(module) and id(module) not in head_ids and name.rpartition(".")[2] not in HEAD_NAMES
    ]
    if targets != ALL_LINEAR:
        wanted = tuple(t.strip() for t in targets.split(",") if t.strip())
        matching = {t: [n for n in quantized if n == t or n.endswith("." + t)] for t in wanted}
        for target in (t for t, names in matching.items() if not names and any(matching.values())):
            raise UsageError(f"no quantized layer matches the adapter target {target!r}")
        quantized = [n for n in quantized if any(n in names for names in matching.values())]
    if not quantized:
        raise UsageError(f"no quantized layer matches the adapter targets {targets!r}")
    return quantized


def unfit(model: nn.Module, targets: Sequence[str]) -> Mapping[str, str]:
    """Targets an adapter library refuses or must not wrap, each with the reason."""
    choosing = routers.routers(model)
    reasons = {}
    for name in targets:
        parent, _, last = name.rpartition(".")
        owner = type(model.get_submodule(parent)).__name__
        if name in choosing:
            reasons[name] = "a router: an adapter on it moves which experts run, and some return tuples"
        elif last == "out_proj" and (STATE_SPACE.search(owner) or hasattr(model.get_submodule(parent), "A_log")):
            reasons[name] = f"{owner} reads this layer's weight itself and never calls it"
    return reasons


def linear_layers(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Those of the named layers that PEFT takes as ``target_modules``: all but stacks of experts.

    Its adapters on parametrized parameters fail in their second forward (docs/findings/peft_parametrized_experts.py).
    """
    return [name for name in layers if hasattr(model.get_submodule(name), "in_features")]


class Attached(NamedTuple):
    """A model to train (PEFT returns a wrapper), and the adapters' parameters by name."""

    model: nn.Module
    adapters: dict[str, nn.Parameter]


def attach(
    model: nn.Module, layers: Sequence[str], *, library: str, rank: int, seed: int, scaling: float = 2.0
) -> Attached:
    """Adapters on the named layers, both factors drawn, so that every adapter has a gradient by construction."""
    if library == "peft":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=round(scaling * rank), target_modules=linear_layers(model, layers))
        wrapped: Any = get_peft_model(model, config)
        owned = {n: p for n, p in wrapped.named_parameters() if ".lora_" in n}
    else:
        wrapped = lora.attach(model, rank=rank, alpha=scaling * rank, targets=list(layers))
        owned = lora.parameters(wrapped)
    draw(owned, seed)
    return Attached(wrapped, owned)


def let_peft_import(model: nn.Module, layers: Sequence[str]) -> None:
    """Put adapters of PEFT on a copy of the first of these layers.

    Where PEFT meets a layer that it does not know it imports packages of other quantizers, which start threads and set variables:
    no doing of an implementation that is judged afterwards.
    """
    if not layers or not find_spec("peft"):
        return
    from peft import LoraConfig, get_peft_model

    with suppress(Exception), torch.random.fork_rng(devices=[]):  # what PEFT refuses is told where it is asked for
        get_peft_model(nn.Sequential(deep_copy(model.get_submodule(layers[0]))), LoraConfig(r=1, target_modules=["0"]))


def draw(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """Fill adapters with small numbers that depend on name and seed alone: same on any device, in any dtype."""
    for name, parameter in parameters.items():
        parameter.data.copy_(SPREAD * noise(name, parameter, seed) / parameter.shape[-1] ** 0.5)


def noise(name: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal numbers of this shape that depend on name and seed alone."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest(), "big")
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(key))


def moved(parameters: Mapping[str, nn.Parameter], seed: int) -> dict[str, torch.Tensor]:
    """The numbers of adapters as training might have moved them: each is about an eighth of their size from where it is."""
    away = {name: noise(f"{name} moved", parameter, seed).to(parameter) for name, parameter in parameters.items()}
    return {name: (p + p.abs().mean() / 8 * away[name]).detach() for name, p in parameters.items()}


@contextmanager
def holding(parameters: Mapping[str, nn.Parameter], numbers: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Parameters have these numbers, by name, while the context is open."""
    own = {name: parameters[name].detach().clone() for name in numbers}
    try:
        _put(parameters, numbers)
        yield
    finally:
        _put(parameters, own)


@torch.no_grad()
def _put(parameters: Mapping[str, nn.Parameter], numbers: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in numbers.items():
        parameters[name].copy_(tensor)
