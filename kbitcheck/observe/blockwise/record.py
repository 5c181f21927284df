"""Records one training step block by block: what enters and leaves each call of each block, forward and backward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from kbitcheck.models.blocks import is_block
from kbitcheck.observe.internals import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten
from kbitcheck.observe.probes.blocks import HANDED_IN
from kbitcheck.observe.probes.choices import RecordChoices
from kbitcheck.observe.probes.tap import Tap

TENSOR = object()  # stands for a floating tensor in a recorded output


@dataclass(slots=True)
class BlockCall:
    """One call of one block in a training step.

    ``leaves`` are the flattened positional and keyword arguments, by parameter in ``names``; ``differentiable`` are the indices of those that
    required grad. ``outputs`` are the floating tensors that the block returned, ``tracked`` whether each required grad;
    ``returned`` is all that it returned, flattened, with ``TENSOR`` in their place. ``entering`` are the gradients that
    entered the outputs in backward, by position, and ``leaving`` those that left through the differentiable leaves, by
    index; what no gradient reached is missing. ``choices`` are the indices of the block's ``topk``, the experts that it
    routed to, and the gates of its ``relu``. ``autocast`` is the dtype of autocast in the block, None where it was off.
    """

    block: str
    leaves: list[Any]
    names: list[str]
    structure: TreeSpec
    differentiable: tuple[int, ...]
    device: str
    autocast: torch.dtype | None
    outputs: list[torch.Tensor] = field(default_factory=list)
    tracked: list[bool] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)
    returned_structure: TreeSpec | None = None
    entering: dict[int, torch.Tensor] = field(default_factory=dict)
    leaving: dict[int, torch.Tensor] = field(default_factory=dict)
    choices: list[torch.Tensor] = field(default_factory=list)

    def arguments(self, like: Mapping[int, torch.Tensor], differentiable: Sequence[int]) -> tuple[list[Any], Any, Any]:
        """Leaves in the dtypes of ``like``, those of given indices requiring grad, and the args and kwargs made of them."""
        leaves = [
            leaf.to(like[i].dtype) if i in like and floating(leaf) else leaf for i, leaf in enumerate(self.leaves)
        ]
        for index in differentiable:
            leaves[index] = leaves[index].detach().clone().requires_grad_(True)
        args, kwargs = tree_unflatten(leaves, self.structure)
        return leaves, args, kwargs

    def around(self) -> AbstractContextManager[Any]:
        """Autocast as it was in the block."""
        return torch.autocast(self.device, dtype=self.autocast) if self.autocast else nullcontext()


def _add(store: dict[int, torch.Tensor], key: int, gradient: torch.Tensor) -> None:
    before = store.get(key)
    store[key] = gradient.clone() if before is None else before + gradient


def floating(leaf: Any) -> bool:
    """True for a floating-point tensor."""
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def outermost_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks that no other block contains; empty for a model without blocks."""
    names: list[str] = []
    for name, module in model.named_modules():
        if is_block(module) and not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
    return names


def parameter_names(module: nn.Module, args: Any, kwargs: Any) -> list[str]:
    """For each leaf of a call's arguments, the parameter of ``forward`` that it was passed to, and its place therein."""
    parameters = [*inspect.signature(type(module).forward).parameters][1:]
    positional = {i: parameters[i] if i < len(parameters) else f"argument {i}" for i in range(len(args))}
    values = {**{positional[i]: value for i, value in enumerate(args)}, **kwargs}
    return [str(key.key) + keystr(tuple(rest)) for (key, *rest), _ in tree_flatten_with_path(values)[0]]  # type: ignore[attr-defined]


class _Recorder:
    """Hooks round each block. ``calls`` are in the order in which they began."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[BlockCall] = []
        self._open: list[tuple[BlockCall, RecordChoices]] = []
        self._handles: list[Any] = []
        for name in outermost_blocks(model):
            module = model.get_submodule(name)
            # Before other hooks: what they read, as transformers' collectors of hidden states do, carries gradients too.
            self._handles.append(module.register_forward_pre_hook(self._entered(name), prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._left, prepend=True))

    def remove(self) -> None:
        """Take the hooks off; close what a raising forward left open."""
        for handle in self._handles:
            handle.remove()
        while self._open:
            self._open.pop()[1].__exit__(None, None, None)

    def _entered(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            leaves, structure = tree_flatten((args, kwargs))
            names = parameter_names(module, args, kwargs)
            differentiable = tuple(i for i, leaf in enumerate(leaves) if floating(leaf) and leaf.requires_grad)
            kept = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            device = next((leaf.device.type for leaf in kept if isinstance(leaf, torch.Tensor)), "cpu")
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            call = BlockCall(name, kept, names, structure, differentiable, device, autocast)
            self.calls.append(call)
            for index in differentiable:
                tapped = Tap.apply(leaves[index], partial(_add, call.leaving, index))
                setattr(tapped, HANDED_IN, leaves[index])
                leaves[index] = tapped
            choices = RecordChoices(gates=True)
            choices.__enter__()
            self._open.append((call, choices))
            return tree_unflatten(leaves, structure)

        return hook

    def _left(self, module: nn.Module, args: Any, output: Any) -> Any:
        call, choices = self._open.pop()
        choices.__exit__(None, None, None)
        call.choices = choices.indices
        leaves, call.returned_structure = tree_flatten(output)
        for index, leaf in enumerate(leaves):
            call.returned.append(TENSOR if floating(leaf) else leaf)
            if floating(leaf):
                if leaf.requires_grad:
                    leaves[index] = Tap.apply(leaf, partial(_add, call.entering, len(call.outputs)))
                call.outputs.append(leaf.detach().clone())
                call.tracked.append(leaf.requires_grad)
        return tree_unflatten(leaves, call.returned_structure)


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[BlockCall]]:
    """The calls of the outermost blocks in the steps that run while the context is open. Checkpointing must be off."""
    recorder = _Recorder(model)
    try:
        yield recorder.calls
    finally:
        recorder.remove()
