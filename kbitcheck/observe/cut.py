"""Proof that a cut of a model is one, and that an implementation treats the whole model and the cut alike."""

import copy
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from kbitcheck.core.facts import Tower
from kbitcheck.models import vocabulary
from kbitcheck.models.blocks import described
from kbitcheck.models.cut import Cut, NoCut, cut
from kbitcheck.observe.probes import digest, forwards, step, switches
from kbitcheck.observe.probes.live import hidden_states, tensors

Descriptions = Mapping[str, Mapping[str, str]]  # by module and attribute


@dataclass(frozen=True, slots=True)
class ProvenCut:
    """A cut, with descriptions of all modules of the whole model and of the cut as loaded."""

    cut: Cut
    whole: Descriptions
    short: Descriptions

    def require_alike(self, whole: nn.Module, short: nn.Module) -> None:
        """Raise ``NoCut`` unless a preparation changed the cut (``short``) as it changed the whole model.

        A block that is not in the cut must be changed as one of the same kind that is.
        """
        on_whole = _changes(self.whole, _described(whole, self.cut.vocabulary))
        on_cut = _changes(self.short, _described(short))
        towers = self.cut.towers
        dropped = {f"{t.name}.{i}": t for t in towers for i in range(t.kept, t.total)}
        outside = {name for name in on_whole if not any(_within(name, block) for block in dropped)}
        for name in sorted({*outside, *on_cut}):
            if on_whole.get(name) != on_cut.get(name):
                raise NoCut(f"preparation changes {name or 'the model'} otherwise in a cut")
        for name, tower in dropped.items():
            kept = [f"{tower.name}.{i}" for i in range(tower.kept)]
            like = [other for other in kept if _of_block(self.whole, other) == _of_block(self.whole, name)]
            if not any(_of_block(on_whole, other) == _of_block(on_whole, name) for other in like):
                raise NoCut(f"preparation changes {name} otherwise than the blocks of its kind in a cut")


def proven_cut(whole: nn.Module, batch: step.Batch) -> ProvenCut:
    """The cut of a model that has never run; its parameters, its blocks' inputs and its logits are bitwise the whole's.

    In the whole model the blocks that are not in the cut hand on their inputs. A tower that another one reads otherwise
    than at its end stays whole. Of a large vocabulary the cut has the first tokens, and its logits are the whole's of these.

    Raises:
        NoCut: there is no cut, or it is none.
    """
    if tokens := vocabulary.fewer(whole, batch):
        with suppress(NoCut):
            return _proven(whole, batch, tokens)
    return _proven(whole, batch, None)


def _proven(whole: nn.Module, batch: step.Batch, tokens: vocabulary.Vocabulary | None) -> ProvenCut:
    uncut: set[str] = set()
    while True:
        made = cut(whole, uncut=uncut, vocabulary=tokens)
        _require_same_tensors(whole, made)
        expected = _run(_handing_on(whole, made), made, batch)
        actual = _run(copy.deepcopy(made.model), made, batch)
        if expected == actual:
            return ProvenCut(made, _described(whole, tokens), _described(made.model))
        where = next((i for i, (one, other) in enumerate(zip(expected, actual, strict=False)) if one != other), 0)
        first = expected[where]
        # As a text model reads the last hidden state but one of an image tower, which is another in a shorter tower.
        before = {call.tower for call in expected[:where]} - {first.tower}
        if not first.tower or not before or before <= uncut:
            raise NoCut(f"{first} in the cut is not the whole model's")
        uncut |= before


def _require_same_tensors(whole: nn.Module, made: Cut) -> None:
    for kind in ("named_parameters", "named_buffers"):
        own = dict(getattr(whole, kind)())
        for name, tensor in getattr(made.model, kind)():
            if name not in own or not (tensor is own[name] or _same(tensor, own[name], made)):
                raise NoCut(f"{name} is another in the cut")


def _same(tensor: torch.Tensor, whole: torch.Tensor, made: Cut) -> bool:
    """Whether a tensor of a cut has the bits of the whole model's, of a table of tokens those of its first rows."""
    return digest.bits(tensor) == digest.bits(whole[: len(tensor)] if id(whole) in made.rows else whole)


def _handing_on(whole: nn.Module, made: Cut) -> nn.Module:
    """A copy of the whole model whose blocks that the cut lacks hand on their inputs; the weights of these are shared.

    It has the cut's tokens: a product of fewer columns may round otherwise.
    """
    memo: dict[int, Any] = {
        id(t): t for _, block in made.dropped(whole) for t in (*block.parameters(), *block.buffers())
    }
    memo |= made.rows
    model = copy.deepcopy(whole, memo)
    if made.vocabulary:
        made.vocabulary.shorten_settings(model)
    returned: dict[str, Any] = {}

    def keep(tower: Tower, module: nn.Module, args: Any, output: Any) -> None:
        returned[tower.name] = output

    def hand_on(tower: Tower, *args: Any, **kwargs: Any) -> Any:
        hidden, output = hidden_states(args, kwargs), returned[tower.name]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for tower in made.towers:
        model.get_submodule(f"{tower.name}.{tower.kept - 1}").register_forward_hook(partial(keep, tower))
    for tower, block in made.dropped(model):
        block.forward = partial(hand_on, tower)
    return model


@dataclass(frozen=True, slots=True)
class _Call:
    """Digests of all that enters one call of a block; with neither block nor tower, of the logits."""

    tower: str
    block: str
    bits: tuple[str, ...]

    def __str__(self) -> str:
        return f"what enters {self.block}" if self.block else "what the model returns"


def _run(model: nn.Module, made: Cut, batch: step.Batch) -> list[_Call]:
    """What enters the blocks of the cut in a forward of a model, and its logits."""
    calls: list[_Call] = []

    def enters(tower: str, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(_Call(tower, name, tuple(map(digest.bits, tensors(args, kwargs)))))

    try:
        with ExitStack() as hooks, switches.seeded(0, batch), switches.cache_off(model):
            for tower in made.towers:
                for name in (f"{tower.name}.{index}" for index in range(tower.kept)):
                    hook = partial(enters, tower.name, name)
                    hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
            logits = forwards.forward_logits(model, batch, nullcontext)
    except Exception as error:  # the model's own code may raise anything
        raise NoCut(f"a forward raises {type(error).__name__}: {error}".splitlines()[0]) from error
    return [*calls, _Call("", "", (digest.bits(logits),))]


def _described(model: nn.Module, tokens: vocabulary.Vocabulary | None = None) -> Descriptions:
    """Descriptions of all modules; tables of a whole model's tokens as if they had those of the cut."""
    texts = {name: described(module) for name, module in model.named_modules()}
    if tokens is None:
        return texts
    rows, fewer = f" ({tokens.total}, ", f" ({tokens.kept}, "
    return {name: {key: text.replace(rows, fewer) for key, text in each.items()} for name, each in texts.items()}


def _changes(before: Descriptions, after: Descriptions) -> Descriptions:
    """What a preparation changed of each module, beside numbers: its class, settings, hooks, dtypes and trained parameters."""
    made = {}
    for name in {*before, *after}:
        was, now = before.get(name, {}), after.get(name, {})
        made[name] = {key: now.get(key, "") for key in {*was, *now} if was.get(key) != now.get(key)}
    return made


def _of_block(descriptions: Descriptions, block: str) -> Descriptions:
    """Descriptions of a block and of the modules inside it, by their names in the block."""
    return {name.removeprefix(block): each for name, each in descriptions.items() if _within(name, block)}


def _within(name: str, block: str) -> bool:
    return f"{name}.".startswith(f"{block}.")
