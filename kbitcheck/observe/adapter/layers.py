"""What the tensors of one adapted module say: rank, what they add to its weight, and whether they ever moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from kbitcheck.core.facts.adapter import BASE_LAYER, SavedLayer, SavedTensor
from kbitcheck.observe.adapter import layout

if TYPE_CHECKING:
    from torch import Tensor


def saved(
    module: str,
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    starts: tuple[str, ...],
    *,
    whole: bool,
) -> SavedLayer:
    """The facts of one layer. ``starts`` are the parts that are zero until a step moves them."""
    facts = {part: _tensor(module, keys[part], part, tensor, config) for part, tensor in tensors.items()}
    here = [facts[part] for part in starts if part in facts]
    moved = None if not here else any(not tensor.at_zero for tensor in here)
    pair = _product(tensors)
    if whole or pair is None:
        return SavedLayer(module=module, tensors=facts, moved=moved, whole=whole)
    a, b = pair
    asked = 0
    if config["peft_type"] == "LORA":  # AdaLoRA's ranks shrink while it trains
        asked = int(layout.stated_for(module, config.get("rank_pattern") or {}, config.get("r") or 0))
    experts = _experts(a, b, asked, config, module)
    rank = a.shape[0] // experts
    scaling = _scaling(module, config, asked or rank)
    still: tuple[int, ...] = ()
    if experts > 1 and moved:
        still = tuple(index for index, (_, own) in enumerate(_by_expert(a, b, experts)) if not bool(own.any()))
    finite = not any(t.not_finite for t in facts.values())
    return SavedLayer(
        module=module,
        tensors=facts,
        rank=rank,
        asked=asked or None,
        scaling=scaling,
        norm=scaling * _norm(a, b, experts) if finite and "lora_E" not in tensors else None,
        moved=moved,
        experts=experts,
        still=still,
    )


def _tensor(module: str, key: str, part: str, tensor: Tensor, config: Mapping[str, Any]) -> SavedTensor:
    path = module.replace(f".{BASE_LAYER}", "")
    trains = part.startswith(layout.TOKENS)
    rows = layout.token_rows(path, config) if trains else None
    own = bool(module) and layout.place_of(key, config["peft_type"]).own
    trains = trains or (own and layout.trains_whole(path, part, config["peft_type"], config))
    numbers = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    return SavedTensor(
        key=key,
        part=part,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        not_finite=int(numbers.numel() - numbers.isfinite().sum()),
        at_zero=not bool(numbers.count_nonzero()),
        own=own and (trains or part in ("weight", "bias")),
        trains=trains,
        rows=rows,
    )


def _product(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The two factors, (rank, in) and (out, rank), in their own dtype; those of a convolution with its window in ``in``."""
    for first, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        a, b = tensors.get(first), tensors.get(second)
        if a is not None and b is not None and min(a.dim(), b.dim()) >= 2:
            return a.flatten(1), b.flatten(1)
    return None


def _experts(a: Tensor, b: Tensor, rank: int, config: Mapping[str, Any], module: str) -> int:
    """How many experts share the factors, where the configuration targets parameters and the module is none of its modules."""
    targeted = any(
        path.rpartition(".")[0].endswith(_outermost(module)) for path in config.get("target_parameters") or ()
    )
    rows = a.shape[0]
    return rows // rank if targeted and rank and rows % rank == 0 and b.shape[1] == rows else 1


def _outermost(module: str) -> str:
    return module.replace(".base_layer", "").rpartition(".")[2]


def _scaling(module: str, config: Mapping[str, Any], rank: int) -> float:
    alpha = float(layout.stated_for(module, config.get("alpha_pattern") or {}, config.get("lora_alpha") or rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if rank else 0.0


def product(tensors: Mapping[str, Tensor], experts: int, scaling: float) -> Tensor:
    """What the factors add, expert by expert: (experts, out, in), in float32."""
    pair = _product(tensors)
    assert pair is not None
    return torch.stack([scaling * (b @ a) for a, b in _by_expert(*pair, experts)])


def _by_expert(a: Tensor, b: Tensor, experts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The factors of each expert in float32. PEFT lays a stack out as (experts, rank) in A's rows, as (rank, experts) in B's columns."""
    rows, columns = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts)
    return ((rows[index].float(), columns[..., index].float()) for index in range(experts))


def _norm(a: Tensor, b: Tensor, experts: int) -> float:
    """The Frobenius norm of the product, from the factors' Gram matrices, which are of the rank's size."""
    grams = (((a @ a.T).double() * (b.T @ b).double()).sum() for a, b in _by_expert(a, b, experts))
    return math.sqrt(max(float(sum(grams)), 0.0))
