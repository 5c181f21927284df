"""What a model's tensors weigh, to the byte, by what they are part of."""

from collections import defaultdict

import torch
from torch import nn

from kbitcheck.core.anatomy import group_of, group_of_buffer, norm_parameters
from kbitcheck.core.facts import HALF, GroupFacts, ModelFacts
from kbitcheck.core.profile import PROMISES
from kbitcheck.observe import internals
from kbitcheck.observe.probes.live import state_tensors


def groups(model: nn.Module, facts: ModelFacts) -> dict[str, GroupFacts]:
    """Parameters and bytes of each group of ``model``, whose snapshot is ``facts``; every storage counts once.

    A packed weight counts as many parameters as it unpacks to; bytes are those stored, and ``state`` what unpacks them.
    """
    norms = norm_parameters(facts)
    sizes: defaultdict[str, GroupFacts] = defaultdict(GroupFacts)
    seen: set[int] = set()
    shared: set[int] = set()
    for name, tensor in {**facts.parameters, **facts.packed}.items():
        if tensor.storage in seen:
            continue
        seen.add(tensor.storage)
        layer = facts.holder(name) if tensor.packed else None
        if layer is not None:
            state = {} if layer.stack else state_tensors(model.get_submodule(layer.name))
            state = {part: t for part, t in state.items() if f"{layer.name}.{part}" not in facts.buffers}
            added = GroupFacts(
                parameters=layer.in_features * layer.out_features,
                quantized=layer.in_features * layer.out_features,
                packed=tensor.nbytes,
                state=sum(_once(t, shared) for t in state.values()),
            )
        else:
            numbers = torch.Size(tensor.shape).numel()
            added = GroupFacts(
                parameters=numbers,
                unquantized=tensor.nbytes,
                upcast={
                    profile: 4 * numbers - tensor.nbytes
                    for profile, promise in PROMISES.items()
                    if tensor.dtype in HALF and promise.casts(norm=name in norms)
                },
            )
        sizes[group_of(tensor, facts, norms)] += added
    for tensor in facts.buffers.values():
        if tensor.storage not in seen:
            seen.add(tensor.storage)
            sizes[group_of_buffer(tensor.name)] += GroupFacts(buffers=tensor.nbytes)
    return dict(sizes)


def _once(tensor: torch.Tensor, seen: set[int]) -> int:
    storage = internals.storage_id(tensor)
    new = storage not in seen
    seen.add(storage)
    return tensor.nbytes if new else 0
