"""What a block itself adds to the gradient of a tensor that it is passed or returns, which others may read, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

Edge = tuple[Any, int]  # a node of the graph, and which of its outputs


def edge(tensor: torch.Tensor) -> Edge:
    """Where the gradient of a tensor that requires grad goes."""
    place = get_gradient_edge(tensor)
    return place.node, place.output_nr


Store = dict[int, torch.Tensor]


def sums(outputs: list[torch.Tensor], edges: Mapping[int, Edge], store: Store, inside: Store) -> Iterator[Any]:
    """Hooks on what computes ``outputs`` and reads the tensors of ``edges``, which add the gradients of each in ``store``, by index.

    They are added as autograd adds them, so that the sum has the bits of the tensor's gradient if nothing else reads it.
    ``inside`` gets those of outputs that another output is computed from, as of probabilities of attention.
    """
    returned = {edge(output): (inside, index) for index, output in enumerate(outputs) if output.grad_fn is not None}
    places = returned | {place: (store, index) for index, place in edges.items()}
    before = {
        node for node, _ in edges.values()
    }  # what made the tensors, or returned them as they are, is no part of the block
    visited: set[Any] = {output.grad_fn for output in outputs} - {None} - before
    todo = list(visited)
    visited |= before
    while todo:
        node: Any = todo.pop()
        reads = [places.get(source) for source in node.next_functions]
        if any(reads):
            yield node.register_hook(partial(_add, reads))
        for source, _ in node.next_functions:
            if source is not None and source not in visited:
                visited.add(source)
                todo.append(source)


def _add(reads: list[tuple[Store, int] | None], gradients: Any, _: Any) -> None:
    for read, gradient in zip(reads, gradients, strict=False):
        if read is not None and gradient is not None:
            store, index = read
            before = store.get(index)
            store[index] = gradient.detach().clone() if before is None else before + gradient.detach()


# Of what is left over, beside the gradient: a product rounded to bfloat16 is off by less.
ROUNDED = 2.0**-7


def alone(gradient: torch.Tensor, added: torch.Tensor) -> bool:
    """Whether nothing but the block reads a tensor: its gradient is what the block ``added``, or that times a number.

    No second reader adds a multiple of what the first adds; what multiplies a gradient is a hook.
    """
    if torch.equal(gradient, added):
        return True
    whole, own = gradient.double().flatten(), added.double().flatten()
    square = float(own @ own)
    factor = float(whole @ own) / square if square else 1.0
    return abs(factor - 1) > ROUNDED and float((whole - factor * own).norm()) <= ROUNDED * float(whole.norm())
