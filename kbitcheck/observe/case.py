"""A case: one model, quantized one way, prepared by one implementation; its facts, each computed when first read.

Whatever runs or saves a model may change it, so each fact that does either gets a fresh copy, prepared anew, and only
the steps that leave the model as it was share one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Raised, Unavailable, UsageError
from kbitcheck.core.facts import (
    HALF,
    CallFacts,
    Distance,
    ForecastFacts,
    GradientFacts,
    LayerBackward,
    MemoryFacts,
    ModelFacts,
    RunFacts,
)
from kbitcheck.models.inputs.choose import kinds
from kbitcheck.models.inputs.text import first_rows
from kbitcheck.models.sources.live import Given
from kbitcheck.observe import figures as summary
from kbitcheck.observe.copies import Copies
from kbitcheck.observe.loaded import Attached, Base, base_of
from kbitcheck.observe.probes import digest, layers, memory, snapshot, step
from kbitcheck.observe.probes.call import call
from kbitcheck.observe.static import StaticCase, static_case
from kbitcheck.observe.twin import twins as twin


class Prepares(Protocol):
    """What a case needs of an implementation: a name, a callable, and what its import replaced in the libraries."""

    @property
    def name(self) -> str: ...
    @property
    def function(self) -> Callable[..., Any]: ...
    @property
    def patches(self) -> Sequence[str]: ...


def open_case(spec: CaseSpec, implementation: Prepares, *, seconds: float = math.inf) -> Case | StaticCase:
    """The case of a spec; nothing is prepared or run before a fact is read.

    Where the spec says so, or the model is too large for this machine or for ``seconds``, it reads no weights.

    Raises:
        UsageError: the model cannot be loaded as asked.
    """
    return static_case(spec, seconds) or Case(
        spec, implementation.function, base_of(spec), patches=implementation.patches
    )


def open_live(model: Any, *, implementation: Prepares, **options: Any) -> Case:
    """The case of a quantized model that the caller has; it is copied, and the copies are prepared and run.

    Raises:
        UsageError: no layer of it is quantized, or an option is unknown.
    """
    given = Given(model)
    device = str(next(model.parameters()).device)
    try:
        spec = CaseSpec(
            model=given.name, quant=given.quant, implementation=implementation.name, **{"device": device, **options}
        )
    except TypeError as error:
        raise UsageError(f"unknown option: {error}") from None
    base = Base(given, Quantization.parse(spec.quant), spec)
    return Case(spec, implementation.function, base, patches=implementation.patches)


def checkpointed_alone(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Any:
    """No preparation: the base frozen, so that adapters alone train, and checkpointed as transformers does it."""
    model.requires_grad_(False)
    if use_gradient_checkpointing and getattr(model, "supports_gradient_checkpointing", False):
        step.quietly(lambda: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs))
        model.enable_input_require_grads()
    return model


class Case(Copies):
    """Facts of one case, as ``kbitcheck.core.facts.Facts`` describes them."""

    live = False
    _told: tuple[CallFacts, Mapping[str, bool]] | None = None

    def close(self) -> None:
        """Drop every model of the case."""
        for name in list(vars(self)):
            if isinstance(getattr(type(self), name, None), cached_property):
                del self.__dict__[name]

    # Of the base

    @property
    def compute_ulp(self) -> float:
        return float(torch.finfo(self._base.compute).eps)

    @property
    def half_ulp(self) -> float:
        return float(torch.finfo(self._base.half).eps)

    @property
    def remote_code(self) -> bool:
        config = getattr(self._base.pristine, "config", None)
        return self._base.source.remote_code or bool(getattr(config, "auto_map", None))

    # The call, and one object that all runs on which leaves it as it was

    @cached_property
    def _object(self) -> Any:
        """What the call returned. Once it was let go, who asks for it gets another."""
        model = self._base.copy()
        flags = {}
        for index, (name, module) in enumerate(model.named_modules()):
            module.training = flags[name] = index % 3 != 1
        returned, facts = call(self.prepare, model, libraries=True, **self.wanted)
        self._told = self._told or (facts, flags)
        return returned if isinstance(returned, nn.Module) else model

    def _let_go(self) -> None:
        if self._base.large:
            self.__dict__.pop("_attached", None)
            self.__dict__.pop("_object", None)

    @property
    def _called(self) -> tuple[CallFacts, Mapping[str, bool]]:
        if self._told is None:
            _ = self._object
        assert self._told is not None
        return self._told

    @property
    def call(self) -> CallFacts:
        return self._called[0]

    @property
    def training_flags(self) -> Mapping[str, bool]:
        """``training`` of each module of the model as it was handed over: a mixture."""
        return self._called[1]

    @property
    def _model(self) -> Any:
        if self.call.raised:
            raise Unavailable(f"preparation raised {self.call.raised}", failed=True, raised=self.call.raised)
        return self._object

    @cached_property
    def prepared(self) -> ModelFacts:
        return snapshot.snapshot(self._model)

    # Adapters and steps on one object, none of which changes it

    @cached_property
    def _attached(self) -> Attached:
        _ = self.prepared
        return self._base.attach(self._model, self.spec)

    @cached_property
    def wrapped(self) -> ModelFacts:
        return snapshot.snapshot(*self._attached)

    @cached_property
    def _plain(self) -> tuple[RunFacts, step.Gradients]:
        model, adapters = self._ready
        with step.checkpointing_off(model):
            return step.train_step(model, self.batch, adapters, seed=self.spec.seed, autocast=self._autocast())

    @property
    def _ready(self) -> Attached:
        """The wrapped model, after it was looked at."""
        self._needs_to_run()
        _ = self.wrapped
        return self._attached

    @property
    def plain_run(self) -> RunFacts:
        return self._plain[0]

    @cached_property
    def _checkpointed(self) -> tuple[RunFacts, step.Gradients]:
        model, adapters = self._ready
        return step.train_step(model, self.batch, adapters, seed=self.spec.seed, autocast=self._autocast())

    @property
    def run(self) -> RunFacts:
        return self._checkpointed[0]

    @cached_property
    def step_raised(self) -> Raised | None:
        return self._raised(lambda: self.run)

    @cached_property
    def other_mode_raised(self) -> Raised | None:
        return self._raised(lambda: self.against_other_mode)

    def _raised(self, ask: Callable[[], Any]) -> Raised | None:
        """What computing a fact of the model with its adapters raises, if anything."""
        _ = self._ready
        try:
            ask()
        except Unavailable as gap:
            if gap.failed:
                return Raised.of(gap)
            return None  # no forward runs, which has been told
        except Exception as error:
            return Raised.of(error)
        return None

    def _needs_the_libraries(self) -> None:
        """A witness proves nothing in libraries that the implementation changed, when it was imported or called.

        Raises:
            Unavailable: it did.
        """
        if self._patches or any("." in name for name in self.call.process):
            raise Unavailable("the implementation patches the libraries, so that no base in this process is a witness")

    @cached_property
    def unprepared(self) -> Case:
        self._needs_the_libraries()
        mode = self.checkpointing
        with suppress(Unavailable):  # it may not run at all
            if mode == "default" and not self.step_raised:  # torch's default and transformers' differ
                reentrant = any(c["use_reentrant"] == "True" for c in self.run.checkpoints)
                mode = "reentrant" if reentrant else "non-reentrant"
        return Case(dataclasses.replace(self.spec, checkpointing=mode), checkpointed_alone, self._base)

    @cached_property
    def bare(self) -> Case:
        self._needs_the_libraries()

        def cast_alone(model: Any, use_gradient_checkpointing: bool = False) -> Any:
            twin.cast(model.requires_grad_(False), self.profile)
            return model

        return Case(dataclasses.replace(self.spec, checkpointing="off"), cast_alone, self._base)

    @cached_property
    def gradients(self) -> Mapping[str, GradientFacts]:
        return self._twins.whole.beside(self._checkpointed[1])

    @cached_property
    def single_gradients(self) -> Mapping[str, GradientFacts]:
        """Those of a step on one row without a mask."""
        model, adapters = self._ready
        _, found = step.train_step(
            model, self._base.single, adapters, seed=self.spec.seed, autocast=self._autocast(), watch=False
        )
        return self._twins.single.beside(found)

    @cached_property
    def against_plain(self) -> Mapping[str, Distance]:
        return step.distances(self._checkpointed[1], self._plain[1], self._yardsticks)

    @property
    def _yardsticks(self) -> Mapping[str, float]:
        whole, single = self._twins.whole, self._twins.single
        known = {**single.yardsticks, **whole.yardsticks}  # one row's where the whole batch's cannot be told
        least = whole.median_yardstick or single.median_yardstick
        return {n: max(known.get(n, 0.0), least) for n in whole.exact}

    @cached_property
    def against_other_mode(self) -> Mapping[str, Distance]:
        model, adapters = self._ready
        reentrant = any(c["use_reentrant"] == "True" for c in self.run.checkpoints)
        with step.checkpointing_switched(model, use_reentrant=not reentrant):
            _, other = step.train_step(
                model, self.batch, adapters, seed=self.spec.seed, autocast=self._autocast(), watch=False
            )
        return step.distances(self._checkpointed[1], other, self._yardsticks)

    @cached_property
    def against_plain_dropout(self) -> Mapping[str, Distance]:
        model, adapters = self._ready
        found = []
        with step.dropout_raised(model):
            for off in (False, True):
                with step.checkpointing_off(model) if off else torch.enable_grad():
                    _, gradients = step.train_step(
                        model, self.batch, adapters, seed=self.spec.seed, autocast=self._autocast(), watch=False
                    )
                found.append(gradients)
        return step.distances(found[0], found[1], self._yardsticks)

    @cached_property
    def layer_backwards(self) -> Mapping[str, LayerBackward]:
        model, adapters = self._ready
        known = (self._base.weights, self._base.misread)
        found = layers.backwards(model, self.batch, adapters, *known, self._autocast(), extremes=True)
        if any(f.raised and f.autocast and f.condition.startswith("train") for f in self.forwards):  # KB210's to tell
            return found
        if any(p.quantized_bias for p in self.wrapped.parameters.values()):
            del model, adapters
            model, adapters = self._attached_copy()  # an int8 layer casts its bias in place to whatever dtype comes in
        try:
            mixed = self._mixed_backwards(model, adapters)
        except RuntimeError:
            if self._base_bears_autocast:
                raise
            return found
        return {**found, **{f"{name} (autocast, batch 1)": layer for name, layer in mixed.items()}}

    def _mixed_backwards(self, model: nn.Module, adapters: Mapping[str, nn.Parameter]) -> Mapping[str, LayerBackward]:
        """Once more as trainers with mixed precision run it, and on a single row."""
        half = torch.autocast(next(iter(self.batch.values())).device.type, dtype=self._base.half)
        single = first_rows(self.batch, 1)
        if not getattr(getattr(self._base.pristine, "config", None), "is_encoder_decoder", False):
            del single["labels"]  # as who computes a loss of their own; a decoder's inputs are made from labels
        known = (self._base.weights, self._base.misread)
        return layers.backwards(model, single, adapters, *known, half, self._base.half)

    @cached_property
    def _base_bears_autocast(self) -> bool:
        """Whether a step under autocast runs in half precision and in float32: some models' own code has a dtype in mind."""
        try:
            for make in (self._base.copy, self._base.wide):
                self._mixed_backwards(make(), {})
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        return True

    @cached_property
    def memory(self) -> MemoryFacts:
        model, adapters = self._ready
        _ = self._checkpointed  # the first step of a model makes what it keeps for good
        return memory.activations(
            model,
            self.batch,
            adapters,
            seed=self.spec.seed,
            autocast=self._base.autocast(self.profile, caching=False),
        )

    @cached_property
    def repeated_run(self) -> RunFacts:
        """The checkpointed step once more, after everything else that ran on this object."""
        _ = (self.memory, self.layer_backwards, self.against_plain_dropout)
        model, adapters = self._ready
        return step.train_step(
            model, self.batch, adapters, seed=self.spec.seed, autocast=self._autocast(), watch=False
        )[0]

    # What is told of them

    @cached_property
    def rounded_biases(self) -> Mapping[str, str]:
        """Bitsandbytes casts a bias to the compute dtype, or to its input's for int8: fp32 unless the profile is half."""
        known = self._base.weights
        names = [n.removesuffix(".bias") for n, p in self.wrapped.parameters.items() if p.quantized_bias]
        found = {}
        for name in names:
            module = self._base.pristine.get_submodule(layers.base_name(name, known))
            found[f"{name}.bias"] = digest.bits(module.bias.to(backends.compute_dtype(module) or torch.float32))
        return found

    @property
    def widened(self) -> Mapping[str, int]:
        after = self.prepared.parameters
        return {
            name: after[name].nbytes - t.nbytes
            for name, t in self.base.parameters.items()
            if not t.packed and t.dtype in HALF and name in after and after[name].dtype not in HALF
        }

    @cached_property
    def forecast(self) -> ForecastFacts:
        """Predicted from the configuration; the steps only where a user asks about this model."""
        return self._base.forecast(self.spec)

    def summary(self) -> dict[str, Any]:
        """Facts for the head of a report; only those already computed beyond the static ones."""
        facts: dict[str, Any] = {
            "model_class": self.base.cls,
            "parameters": sum(layer.in_features * layer.out_features for layer in self.base.layers.values())
            + sum(_unique(self.base)),
            "quantized": sum(layer.in_features * layer.out_features for layer in self.base.layers.values()),
            "bytes_loaded": self.base.nbytes,
        }
        if "_base" in self.__dict__:  # where nothing ran on a live model, nothing was fed to it
            facts["inputs"] = kinds(self._base.batch)
        if "prepared" in self.__dict__:
            facts["bytes_prepared"] = self.prepared.nbytes
            facts["bytes_by_group"] = {
                "loaded": summary.by_group(self.base),
                "prepared": summary.by_group(self.prepared),
            }
        if "forecast" in self.__dict__ and self.forecast.activations:
            facts["forecast"] = self.forecast.as_json()
        if "gradients" in self.__dict__:
            dead = sum(not g.live for g in self.gradients.values())
            facts |= {"adapters": len(self.gradients), "dead_adapters": dead}
            facts["gradient_errors"] = summary.by_layer(self.gradients)
        if "memory" in self.__dict__:
            shape = tuple(next(iter(self.batch.values())).shape[:2])
            facts |= {"activations": self.memory.plain, "checkpointed": self.memory.held, "batch": list(shape)}
            facts["activations_by_block"] = summary.by_block(self.memory)
        if "_training" in self.__dict__:
            facts |= {"losses": list(self.training.losses), "twin_losses": list(self.training.twin_losses)}
        return facts


def _unique(model: ModelFacts) -> list[int]:
    seen = {t.storage: t for t in model.parameters.values() if not t.packed}
    return [_numel(t.shape) for t in seen.values()]


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
