"""Counts what facts really take: forwards, backwards, copies, calls and snapshots, by the fact that is computed."""

from __future__ import annotations

import copy
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from kbitcheck.core.facts import Fact, Passes
from kbitcheck.observe import internals
from kbitcheck.observe.probes import layers

OPENING = ""  # stands for a fact before the first one is computed


class Counts:
    """Passes by the name of the fact at hand, and which facts each fact read."""

    def __init__(self) -> None:
        self._passes: dict[str, Counter[str]] = defaultdict(Counter)
        self.reads: dict[str, set[str]] = defaultdict(set)
        self._facts = [OPENING]
        self.inside = False
        self.precise = False  # whether the last forward was in float64: its backward is then, too

    @property
    def by_fact(self) -> Mapping[str, Passes]:
        """The passes of each fact that took any, those of the facts that it read apart."""
        return {name: Passes(**counter) for name, counter in self._passes.items()}

    def add(self, kind: str) -> None:
        """Count one pass for the fact at hand."""
        self._passes[self._facts[-1]][kind] += 1

    @contextmanager
    def outermost(self, kind: str) -> Iterator[None]:
        """Count a pass, and none that happens in it."""
        if self.inside or not kind:
            yield
            return
        self.add(kind)
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    @contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Passes belong to this fact meanwhile."""
        self._facts.append(name)
        try:
            yield
        finally:
            self._facts.pop()

    def read(self, name: str) -> None:
        """The fact at hand reads a fact."""
        if name != self._facts[-1]:  # a fact of a case and of its stage have one name
            self.reads[self._facts[-1]].add(name)

    def calls(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The implementation, whose calls are counted."""

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            self.add("calls")
            return function(*args, **kwargs)

        return called


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts while the context is open. It replaces methods of torch and of facts meanwhile, so it is for measuring alone."""
    counts = Counts()
    with ExitStack() as patches:
        for owner, name, replace in (
            (nn.Module, "__call__", _forwards),
            (torch.autograd, "backward", _backwards),
            (copy, "deepcopy", _copies),
            (internals, "kept_in_float32", _snapshots),
            (layers.Probes, "results", _products),
            (Fact, "__get__", _reads),
        ):
            patches.enter_context(mock.patch.object(owner, name, replace(counts, getattr(owner, name))))
        yield counts


def _forwards(counts: Counts, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not any(True for _ in self.children()):  # a layer that is probed alone is no model
            return original(self, *args, **kwargs)
        counts.precise = counts.precise if counts.inside else any(p.dtype is torch.float64 for p in self.parameters())
        with counts.outermost("float64_forwards" if counts.precise else "forwards"):
            return original(self, *args, **kwargs)

    return forward


def _backwards(counts: Counts, original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        with counts.outermost("float64_backwards" if counts.precise else "backwards"):
            return original(tensors, *args, **kwargs)

    return backward


def _copies(counts: Counts, original: Callable[..., Any]) -> Callable[..., Any]:
    def deepcopy(item: Any, *args: Any) -> Any:
        with counts.outermost("copies" if isinstance(item, nn.Module) else ""):
            return original(item, *args)

    return deepcopy


def _snapshots(counts: Counts, original: Callable[..., Any]) -> Callable[..., Any]:
    def read(model: nn.Module) -> Any:  # each snapshot calls this once
        if not any(p.is_meta for p in model.parameters()):
            counts.add("snapshots")
        return original(model)

    return read


def _products(counts: Counts, original: Callable[..., Any]) -> Callable[..., Any]:
    def results(*args: Any, **kwargs: Any) -> Any:
        counts.add("float64_products")
        return original(*args, **kwargs)

    return results


def _reads(counts: Counts, original: Callable[..., Any]) -> Callable[..., Any]:
    def get(fact: Fact[Any], owner: Any, cls: type | None = None) -> Any:
        if owner is None:
            return fact
        counts.read(fact.name)
        if fact.name in owner.computed:
            return owner.computed[fact.name]
        with counts.computing(fact.name):
            return original(fact, owner, cls)

    return get
