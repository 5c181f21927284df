"""What is compared with twins in each watched step: one block of every class, and what is outside the blocks."""

from __future__ import annotations

import random
from collections.abc import Mapping

from torch import nn

from kbitcheck import backends
from kbitcheck.core.facts import BlockwiseFacts, Gap, ModelFacts, Part
from kbitcheck.observe.blockwise.record import outermost_blocks
from kbitcheck.observe.meant_to_train import regularized
from kbitcheck.observe.probes import digest
from kbitcheck.observe.probes.snapshot import state_of
from kbitcheck.observe.watch.blocks import SMALL, Recorder, Twins, compared
from kbitcheck.observe.watch.guard import Guard
from kbitcheck.observe.watch.head import compared as head_compared
from kbitcheck.observe.watch.head import large_heads, recorder_of
from kbitcheck.observe.watch.untaught import untaught


class Comparisons:
    """Blocks of a model beside their twins, drawn anew in each step. ``unseen`` is why the last one was not compared.

    Modules outside the blocks, such as the last norm and the head, are compared in every step, so that nothing between the
    last block and the loss goes unseen.
    """

    def __init__(self, model: nn.Module, guard: Guard, seed: int) -> None:
        self.unseen = ""
        self.parts: dict[str, Part] = {}
        self._model, self._guard = model, guard
        self._gaps: dict[str, Gap] = {}
        self._beside: dict[str, Part] = {}  # modules outside the blocks
        self._random = random.Random(seed)  # noqa: S311  (which block is looked at)
        self._taught: dict[
            tuple[str, str], bool
        ] = {}  # by kind of block and name inside: whether a later step teaches it
        self._recast = False
        self._recorders: list[Recorder] = []
        self._twins = Twins()
        self._kinds: dict[str, list[str]] = {}  # names of blocks, by class
        self._outside: dict[str, nn.Module] = {}
        self._heads: dict[str, nn.Linear] = {}  # larger ones outside the blocks

    def facts(self, *, same_kernels: bool) -> BlockwiseFacts:
        """What was compared; nothing where no block was. ``same_kernels``: the model's are those of a twin, where nothing is recast."""
        parts = {**self.parts, **self._beside} if self.parts else {}
        other = not backends.multiply_unpacked(self._model)
        same = same_kernels and not (other or self._recast)
        return BlockwiseFacts(parts=parts, adapters=self._gaps, same_kernels=same, other_kernels=other)

    def look(self) -> None:
        """Before the first forward: which blocks and other modules there are."""
        for name in outermost_blocks(self._model):
            self._kinds.setdefault(type(self._model.get_submodule(name)).__name__, []).append(name)
        self._outside = _small_ones_outside(self._model)
        self._heads = large_heads(self._model)

    def draw(self) -> None:
        """Look at one block of every class, unless some are looked at already."""
        if self._recorders:
            return
        if not self._kinds:
            self.unseen = "the model has no blocks"
        drawn = {name: self._model.get_submodule(name) for name in map(self._random.choice, self._kinds.values())}
        self._recorders = [Recorder(name, block, self._guard) for name, block in {**drawn, **self._outside}.items()]
        self._recorders += [recorder_of(name, head, self._guard, self._random) for name, head in self._heads.items()]

    def next_batch(self) -> None:
        """A forward begins."""
        for recorder in self._recorders:
            recorder.next_batch()

    def compare(self, step: int, before: ModelFacts) -> None:
        """What was recorded in a step beside its twins. ``before`` is the model as it was before the first forward."""
        apart = regularized(self._model)
        for recorder in self._recorders:
            recorder.remove()
            if recorder.name in self._heads:
                self._compare_head(recorder, step)
                continue
            outside = recorder.name in self._outside
            if outside and not recorder.passed_on:
                continue
            self._recast = self._recast or recorder.is_recast
            rewritten = _rewritten(recorder, before)
            seen = "what is frozen in it changed: KB104" if rewritten else compared(recorder, self._twins, apart)
            label = f"{recorder.name} (step {step})"
            if isinstance(seen, str):
                self.unseen = self.unseen if outside else seen
                continue
            part, gaps = seen
            if outside:  # others may use its parameters, as an embedding that is tied to the head does
                self._beside[label] = part
            else:
                self.parts[label] = part
                self._gaps.update((f"{recorder.name}.{name} (step {step})", gap) for name, gap in gaps.items())
                if step > 1:  # in the first, half of the adapters have nothing to learn yet
                    self._note_taught(recorder, gaps)

    def _note_taught(self, recorder: Recorder, gaps: Mapping[str, Gap]) -> None:
        zero = untaught(recorder, self._twins, gaps)
        for name in gaps:
            key = type(recorder.block).__name__, name
            self._taught[key] = self._taught.get(key, False) or name not in zero

    @property
    def untaught(self) -> frozenset[str]:
        """Trained tensors of blocks that no compared step teaches, after the first; what is so in one block is in all of its class."""
        several = ((kind, inside) for (kind, inside), taught in self._taught.items() if not taught)
        return frozenset(f"{block}.{inside}" for kind, inside in several for block in self._kinds[kind])

    def _compare_head(self, recorder: Recorder, step: int) -> None:
        part = head_compared(recorder) if recorder.passed_on else ""
        if isinstance(part, Part):
            self._beside[f"{recorder.name} (step {step})"] = part

    def skip(self, why: str) -> None:
        """Compare nothing in this step."""
        self.unseen = why
        for recorder in self._recorders:
            recorder.remove()

    def remove(self) -> None:
        """Take everything off."""
        for recorder in self._recorders:
            recorder.remove()
        self._recorders = []

    def stop(self) -> None:
        """Drop what is kept for later steps."""
        self.remove()
        self._twins = Twins()


def _small_ones_outside(model: nn.Module) -> dict[str, nn.Module]:
    """The largest modules that hold no block, are in none, and have parameters, few enough for twins that are kept."""
    blocks = outermost_blocks(model)
    small: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") or name == other for other in (*blocks, *small))
        if inside or not name or any(block.startswith(f"{name}.") for block in blocks):
            continue
        if 0 < 8 * sum(p.numel() for p in module.parameters()) < SMALL:
            small[name] = module
    return small


def _rewritten(recorder: Recorder, before: ModelFacts) -> bool:
    """Whether a frozen parameter of a block, or a quantization state, is not as before the first forward: nothing is right beside it then."""
    layers = {f"{recorder.name}.{name}": layer for name, layer in backends.quantized_layers(recorder.block)}
    if any(state_of(layer) != before.layers[name].state for name, layer in layers.items() if name in before.layers):
        return True
    now = {f"{recorder.name}.{name}": p for name, p in recorder.block.named_parameters()}
    frozen = {n: t for n, t in before.parameters.items() if n in now and not (t.adapter or t.quantized_bias)}
    return any(digest.bits(now[name]) != tensor.bits for name, tensor in frozen.items())
