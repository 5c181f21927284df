"""The forwards and backwards of a watched step: losses, labels, dtypes that enter layers, arguments of checkpointing."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from kbitcheck import backends
from kbitcheck.core.facts import MicroBatch, RunFacts, SwitchedOn
from kbitcheck.models.blocks import is_block
from kbitcheck.models.inputs.text import IGNORED
from kbitcheck.observe import internals
from kbitcheck.observe.probes import blocks, digest, kv_cache, switches
from kbitcheck.observe.watch import contents
from kbitcheck.observe.watch.enabling import Enabling, arguments
from kbitcheck.observe.watch.flow import ENOUGH, Flow
from kbitcheck.observe.watch.guard import Guard
from kbitcheck.observe.watch.held import Held
from kbitcheck.observe.watch.reach import Reach


class Batches:
    """What each forward of a model was passed and returned. ``first`` is the step of the first one, None before it."""

    def __init__(self, model: nn.Module, enabled: Sequence[SwitchedOn], guard: Guard) -> None:
        before = SwitchedOn(used=arguments(model))
        self.switched_on = list(enabled) or [before] * bool(before.used)
        self.cached = ""
        self.first: RunFacts | None = None
        self.compiled = any(map(internals.is_compiled, model.modules()))
        self._model, self._guard = model, guard
        self._entering: dict[str, torch.dtype] = {}  # by layer
        self._computes: set[torch.dtype] = set()
        self._batches: list[dict[str, Any]] = []
        self._tokens = ""  # of the batch before, as a digest
        self._used: list[tuple[Any, int]] = []  # gradients of the step before, and how often each was written to
        self.scale = 1.0  # of the loss, by a gradient scaler
        self._seen = nn.Identity() if self.compiled else model  # whose modules hooks may be put on
        self.reach = Reach(self._seen, guard)
        self.flow = Flow(self._seen, guard)
        self._random = ""  # the state before the last forward with dropout, as a digest
        self._beside = 0  # forwards in train mode without gradients, since the last one with them
        self._blocks: blocks.Watch | None = None
        self._held: Held | None = None
        self._calls: list[dict[str, str]] = []
        self._looked_at: dict[str, Any] = {}  # the forward that ``_blocks`` is about

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: a copy of the model, hooks among it, is not looked at."""
        return self

    @property
    def any(self) -> bool:
        """Whether a forward ran since the last step."""
        return bool(self._batches)

    @property
    def entering(self) -> dict[str, int]:
        """The dtypes that entered quantized layers, with the number of layers."""
        return dict(Counter(str(dtype).removeprefix("torch.") for dtype in self._entering.values()))

    @property
    def limit(self) -> float:
        """The largest number that every dtype has in which the model computes; float16's where no quantized layer was seen."""
        own = {p.dtype for p in self._model.parameters() if p.is_floating_point() and not backends.is_packed(p)}
        return min(torch.finfo(dtype).max for dtype in own | (self._computes or {torch.float16}))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hooks on quantized layers, on what switches checkpointing on, and on checkpoints; for a while."""
        with ExitStack() as hooks:
            hooks.enter_context(self.reach.watched())
            hooks.enter_context(self.flow.watched())
            emptied = ((name, layer) for name, layer, _ in backends.emptied_layers(self._seen))
            for name, layer in (*backends.quantized_layers(self._seen), *emptied):
                hooks.enter_context(layer.register_forward_pre_hook(self._guard(partial(self._enters, name))))
            hooks.enter_context(Enabling(PreTrainedModel, self.switched_on.append))
            self._calls = hooks.enter_context(switches.checkpoint_spies())
            hooks.callback(self._close)
            yield

    def _close(self) -> None:
        if self._blocks is not None:
            self._blocks.close()
            self._blocks = None
        if self._held is not None:
            self._held.close()
            self._held = None

    def _enters(self, name: str, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and args and isinstance(args[0], torch.Tensor):
            if self._entering.get(name) is not args[0].dtype:
                self._computes |= _computed(module, args[0])
            self._entering[name] = args[0].dtype

    def begin(self, args: Any, kwargs: Any, rates: tuple[float, ...] = ()) -> None:
        """A forward begins; ``rates`` are the learning rates of optimizers."""
        self.scale = 1.0
        self.reach.forward = True
        if self.first is None and self._blocks is not None and self._blocks.reached:
            self._finish_first()
        labels = kwargs.get("labels")
        count = None
        if isinstance(labels, torch.Tensor):
            counted = labels[..., 1:] if labels.dim() > 1 and labels.shape[-1] > 1 else labels
            count = int((counted != IGNORED).sum())
        batch = {
            "labels": count,
            "counted": kwargs.get("num_items_in_batch") is not None,
            "shifted": _shifts(self._model) and _shifted(kwargs.get("input_ids"), labels),
            **self._contents(kwargs),
            "resting": "" if self._model.training else _resting(self._model),
            "follows": any("weight" in each or each["passage"].size is not None for each in self._batches),
            "passage": self.flow.begin(kwargs),
            "beside": self._beside,
            "redrawn": self._draws_again(),
            "rates": rates,
        }
        self._beside = 0
        self._batches.append(batch)
        if self.first is None:  # a forward without a backward, as an evaluation may be, is not the first
            self._close()
            self._calls.clear()
            self._blocks = blocks.Watch(self._seen, self._guard)
            self._held = Held(self._seen, self._guard)
            self._looked_at = batch
        if kwargs.get("use_cache") is True and self._model.training:
            self.cached = "use_cache=True was passed"

    def without_gradients(self, inputs: Mapping[str, Any]) -> None:
        """A forward begins that takes none."""
        switched_off = (
            getattr(m, name, False) for m in self._model.modules() for name in ("disable_adapters", "_disable_adapters")
        )
        if self._model.training and inputs.get("labels") is not None and not any(off is True for off in switched_off):
            self._beside += 1

    def _contents(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What is odd about the tokens of a batch with labels, and whether they are those of the batch before."""
        tokens = inputs.get("input_ids")
        if not isinstance(tokens, torch.Tensor) or not isinstance(inputs.get("labels"), torch.Tensor):
            odd = tuple(kind for kind in contents.oddities(self._model, inputs) if kind == contents.UNMASKED)
            return {"odd": odd} if odd else {}
        before, self._tokens = self._tokens, digest.bits(tokens)
        odd = contents.oddities(self._model, inputs)
        if _shifts(self._model) and contents.labels_of_others(inputs):
            odd = (*odd, contents.OTHERS)
        return {"odd": odd, "repeated": before == self._tokens}

    def _draws_again(self) -> bool:
        """Whether dropout draws what it drew in the batch before."""
        if not contents.drops(self._model):
            return False
        device = next(self._model.parameters()).device
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        before, self._random = self._random, digest.bits(state)
        return before == self._random

    def end(self, output: Any) -> None:
        """A forward ended; its loss shows later what weight it has."""
        self.reach.forward = False
        self.flow.end(output)
        if self._blocks is not None:
            self._blocks.phase = "backward"
        batch = self._batches[-1]
        if self._held is not None:
            batch["held"] = self._held.facts()
            self._held.close()
            self._held = None
        loss = _loss(output)
        if loss is not None:
            batch["loss"] = float(loss.detach())
            if batch is self._looked_at:
                batch["bits"] = digest.bits(loss.detach())
            if loss.requires_grad:
                loss.register_hook(self._guard(partial(self._weighed, batch)))
        if self._model.training and kv_cache.is_held(output):
            batch["cache"] = True
            self.cached = self.cached or "one is held"

    def _weighed(self, batch: dict[str, Any], gradient: torch.Tensor) -> None:
        if not any("weight" in each for each in self._batches):
            used = [(gradient(), version) for gradient, version in self._used]
            untouched = (g for g, version in used if g is not None and internals.version(g) == version)
            batch["stale"] = sum(bool(internals.local(each).any()) for each in untouched)
        elif batch["follows"]:
            gradients = (p.grad for p in self._model.parameters() if p.grad is not None)
            batch["cleared"] = not any(bool(internals.local(each).any()) for each in gradients)
        batch["weight"] = float(gradient.detach().sum()) / self.scale
        batch["scale"] = self.scale

    def stepped(self, parameters: Iterable[nn.Parameter]) -> None:
        """An optimizer's step has used the gradients of parameters."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._used = [(weakref.ref(gradient), internals.version(gradient)) for gradient in gradients]

    def finish(self) -> None:
        """The optimizer's step begins."""
        if self.first is None and self._blocks is not None:
            self._finish_first()

    def _finish_first(self) -> None:
        batch = self._looked_at
        assert self._blocks is not None
        self.first = RunFacts(
            loss=batch.get("loss", float("nan")),
            loss_bits=batch.get("bits", ""),
            blocks=self._blocks.facts(),
            order=tuple(self._blocks.order),
            checkpoints=tuple(self._calls),
            cache_held=batch.get("cache", False),
            held=batch.get("held", {}),
            base_grads=(),
        )
        self._close()

    def taken(self) -> list[MicroBatch]:
        """What was seen since the last step, which is then forgotten; without forwards that no gradient came back through."""
        batches, self._batches = self._batches, []
        self.flow.step_over()
        if any("weight" in batch for batch in batches):
            batches = [batch for batch in batches if "weight" in batch or "loss" not in batch]
        shifts = _shifts(self._model)
        for batch in batches:
            batch["teaching"] = batch["passage"].taught(shifts=shifts, scale=batch.get("scale", self.scale))
            if batch["teaching"] is not None and batch["teaching"].odd:
                batch["odd"] = tuple(dict.fromkeys((*(batch.get("odd") or ()), *batch["teaching"].odd)))
        return [
            MicroBatch(**{name: batch[name] for name in MicroBatch.__slots__ if name in batch}) for batch in batches
        ]


def _shifts(model: nn.Module) -> bool:
    """Whether the model predicts each next token, and shifts the labels itself, as those of transformers do."""
    inner = next((type(m) for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    return (
        inner is not None
        and inner.__module__.startswith("transformers.models.")
        and inner.__name__.endswith("ForCausalLM")
    )


def _shifted(tokens: Any, labels: Any) -> bool:
    """Whether every label that counts is the token after the one in its place, and most are not the one in its place."""
    both = isinstance(tokens, torch.Tensor) and isinstance(labels, torch.Tensor)
    if not both or tokens.shape != labels.shape or labels.dim() != 2:
        return False
    counts = labels != IGNORED
    following = (labels[:, :-1] == tokens[:, 1:]) | ~counts[:, :-1]
    in_place = int(((labels == tokens) & counts).sum())
    return int(counts.sum()) >= ENOUGH and bool(following.all()) and 2 * in_place < int(counts.sum())


def _resting(model: nn.Module) -> str:
    """What eval mode switches off in a model, in words."""
    resting = [m for m in model.modules() if not m.training]
    blocks = sum(is_block(m) and getattr(m, "gradient_checkpointing", False) is True for m in resting)
    dropouts = sum(isinstance(m, nn.Dropout) and m.p > 0 for m in resting)
    counts = ((blocks, "blocks that checkpoint"), (dropouts, "dropouts"))
    return " and ".join(f"{count:,} {name}" for count, name in counts if count)


def _computed(layer: nn.Module, x: torch.Tensor) -> set[torch.dtype]:
    """The dtypes in which a quantized layer, and what is round it, computes with an input."""
    if not backends.is_quantized(layer):  # FSDP holds its weight
        return {x.dtype, torch.float16}
    arithmetic, device = backends.arithmetic(layer), x.device.type
    dtypes = {
        x.dtype,
        arithmetic.compute_dtype(layer),
        arithmetic.unpacked_dtype(layer),
        arithmetic.product_dtype(layer, x),
    }
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    if arithmetic.rounds_input(layer):  # int8 kernels take float16
        dtypes.add(torch.float16)
    return {dtype for dtype in dtypes if dtype is not None}


def _loss(output: Any) -> torch.Tensor | None:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and output:
        loss = output[0]
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.is_floating_point() else None
