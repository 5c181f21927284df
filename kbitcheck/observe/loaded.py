"""A base: one model, quantized one way, and what is derived from it alone: twins, original weights, forwards, targets."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec, Profile
from kbitcheck.core.errors import Unavailable, cause
from kbitcheck.core.facts import ForecastFacts
from kbitcheck.core.profile import PROMISES
from kbitcheck.models.inputs.text import first_rows
from kbitcheck.models.sources.live import Given
from kbitcheck.models.sources.resolve import Source, source_of
from kbitcheck.observe import heap
from kbitcheck.observe.forecast import predict as forecast
from kbitcheck.observe.probes import adapters as adapter_probe
from kbitcheck.observe.probes import forwards, layers, snapshot, step, targets
from kbitcheck.observe.twin import twins as twin

Attached = tuple[nn.Module, dict[str, nn.Parameter]]


class Function(NamedTuple):
    """Logits of a base: in float64, of the base as it is, and of the twin in the preparation's own dtypes."""

    exact: targets.Routed
    original: targets.Routed
    rounded: targets.Routed


class Base:
    """A quantized model as loaded, never run, with all that is derived from it alone and shared by cases."""

    _no_twin = ""  # why there is none
    _forwards: Sequence[forwards.Forward] | None = None

    def __init__(
        self, source: Source | Given, quant: Quantization, spec: CaseSpec, *, spoil: Callable[[Any], None] | None = None
    ) -> None:
        self.source = source
        self.quant = quant
        self.pristine: Any = source.load(quant, spec.device)
        if spoil is not None:
            spoil(self.pristine)
        self.facts = snapshot.snapshot(self.pristine)
        self.batch: step.Batch = source.batch(self.pristine, batch=spec.batch, seq_len=spec.seq_len, seed=spec.seed)
        self.targets = adapter_probe.target_layers(self.pristine, spec.targets)
        self.weights, self.misread = layers.originals(self.pristine)
        self._functions: dict[str, Function] = {}
        self._twins: dict[tuple[str, ...], twin.Twins] = {}

    @property
    def large(self) -> bool:
        """Whether what comes of a forward is made again when it is asked for again, so that nobody holds it."""
        return self.facts.nbytes > heap.LARGE_BYTES

    def _room(self) -> None:
        """Before one more model is made."""
        if self.large:
            heap.give_back()

    def copy(self) -> Any:
        """A fresh base."""
        self._room()
        return copy.deepcopy(self.pristine)

    @property
    def single(self) -> step.Batch:
        """The batch's first row alone, without a mask."""
        return {k: v for k, v in first_rows(self.batch, 1).items() if k != "attention_mask"}

    @cached_property
    def compute(self) -> torch.dtype:
        """The dtype quantized layers compute in: float32 where they follow prepared (float32) inputs, as int8 does."""
        dtypes = {backends.compute_dtype(m) for m in self.pristine.modules() if backends.is_quantized(m)}
        return next((d for d in dtypes if d is not None), torch.float32)

    def twins(self, spec: CaseSpec) -> twin.Twins:
        """Twins under the spec's profile and adapters, computed once."""
        key = (spec.profile, spec.adapters, str(spec.rank), str(spec.seed))
        if key not in self._twins:
            with self._in_float64():
                self._twins[key] = self._compute_twins(spec)
        return self._twins[key]

    @contextmanager
    def _in_float64(self) -> Iterator[None]:
        """Runs the twin in float64, for which some models' own code is not made: tried once.

        torch tells of that by a ``RuntimeError``; anything else is an error of the twin, and stays one.

        Raises:
            Unavailable: it does not run.
        """
        if not self._no_twin:
            try:
                yield
                return
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._no_twin = f"the float64 twin of this model does not run: {cause(error)}"
        raise Unavailable(self._no_twin)

    def forecast(self, spec: CaseSpec) -> ForecastFacts:
        """What the model takes as its configuration tells it; of the training steps only for ``kbitcheck model``.

        Raises:
            Unavailable: there is no configuration to tell from.
        """
        if not isinstance(self.source, Source):
            raise Unavailable("a live model: there is nothing to predict it from")
        model = self.source.meta(self.quant)
        facts = snapshot.snapshot(model)
        told = forecast.of_weights(model, facts, spec, self.source.notes)
        return told if spec.static == "never" else forecast.with_steps(told, self.source, model, facts, spec)

    @property
    def half(self) -> torch.dtype:
        """What autocast runs in: the compute dtype where it is half, else bfloat16."""
        return self.compute if self.compute in (torch.float16, torch.bfloat16) else torch.bfloat16

    @property
    def forwards(self) -> Sequence[forwards.Forward]:
        """The unprepared base under every condition."""
        if self._forwards is None:
            found = list(forwards.everywhere(self.copy(), self.batch, self.half))
            if self.large:
                return found
            self._forwards = found
        return self._forwards

    def wide(self) -> nn.Module:
        """The model as it were had it never been quantized or in half precision: all of it float32."""
        self._room()
        # Not its own ``float``, which refuses where layers were quantized.
        return nn.Module.float(twin.same_dtype(self.pristine, self.weights, "peft"))

    @cached_property
    def generator(self) -> bool:
        """Whether the unprepared base generates: of some shapes transformers itself cannot make the cache."""
        can = getattr(self.pristine, "can_generate", None)
        return bool(can and can()) and not forwards.generate(self.copy(), self.batch).raised

    def function(self, profile: Profile) -> Function:
        """What a prepared model's logits are measured against, computed once a profile."""
        if profile in self._functions:
            return self._functions[profile]
        with self._in_float64():
            exact = self.logits(twin.float64(self.pristine, self.weights))
        rounded = self.logits(twin.same_dtype(self.pristine, self.weights, profile), profile)
        try:
            original = self.logits(self.copy())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise Unavailable(f"the unprepared base does not run: {cause(error)}") from error
        found = Function(exact=exact, original=original, rounded=rounded)
        if not self.large:
            self._functions[profile] = found
        return found

    def logits(self, model: nn.Module, profile: Profile | None = None) -> targets.Routed:
        """The model's logits on the base's batch, as it runs under a profile (none: as it is)."""
        autocast = self.autocast(profile) if profile else None
        run = partial(twin.forward_logits, model, self.batch, autocast() if autocast else None)
        return targets.Routed(*targets.routed(model, run))

    def autocast(self, profile: str, *, caching: bool = True) -> Callable[[], AbstractContextManager[Any]] | None:
        """How training runs under a profile: mixed dtypes need autocast.

        Autocast keeps the weights that it casts until its end (``caching``): they are no activations.
        """
        if not PROMISES[profile].autocast:
            return None
        device = next(iter(self.batch.values())).device.type
        return lambda: torch.autocast(device, dtype=self.half, cache_enabled=caching)

    def attach(self, model: nn.Module, spec: CaseSpec) -> Attached:
        """The spec's adapters on the base's target layers, with the same numbers each time."""
        return adapter_probe.attach(model, self.targets, library=spec.adapters, rank=spec.rank, seed=spec.seed)

    def _compute_twins(self, spec: CaseSpec) -> twin.Twins:
        autocast = self.autocast(spec.profile)
        batches = (self.batch, self.single)
        model, adapters = self.attach(twin.same_dtype(self.pristine, self.weights, spec.profile), spec)
        rounded = [
            step.train_step(model, b, adapters, seed=spec.seed, watch=False, autocast=autocast and autocast())[1]
            for b in batches
        ]
        model, adapters = self.attach(twin.float64(self.pristine, self.weights), spec)
        adapter_probe.recast(adapters, torch.float64)
        exact = [step.train_step(model, b, adapters, seed=spec.seed, watch=False)[1] for b in batches]
        whole, single = map(twin.Pair, exact, rounded)
        rate, losses = twin.smooth_training(model, self.batch, adapters, seed=spec.seed)
        return twin.Twins(whole=whole, single=single, losses=losses, learning_rate=rate)


_bases: OrderedDict[tuple[Any, ...], Base] = OrderedDict()


def base_of(spec: CaseSpec) -> Base:
    """The spec's base; the last few are kept, as cases come grouped by model and quantization."""
    key = (
        spec.model, spec.quant, spec.device, spec.batch, spec.seq_len, spec.seed, spec.targets, spec.random_weights,
        spec.dtype, spec.revision,
    )  # fmt: skip
    if key not in _bases:
        while len(_bases) > 1:
            _bases.popitem(last=False)
        _bases[key] = Base(source_of(spec), Quantization.parse(spec.quant), spec)
    _bases.move_to_end(key)
    return _bases[key]
