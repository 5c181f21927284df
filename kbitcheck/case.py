"""A case: one model, quantized one way, prepared by one implementation; its facts, each computed when first read.

Whatever runs or saves a model may change it, so each fact that does either gets a fresh copy, prepared anew, and only
the steps that leave the model as it was share one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from kbitcheck import backends, summary
from kbitcheck.base import Attached, Base, base_of
from kbitcheck.core import NotApplicable, UsageError, cause
from kbitcheck.facts import (
    CANNOT_RUN,
    HALF,
    CallFacts,
    CostFacts,
    Distance,
    ForecastFacts,
    ForwardFacts,
    FunctionFacts,
    GradientFacts,
    LayerBackward,
    MemoryFacts,
    ModelFacts,
    RunFacts,
    StepOutcome,
    StoreFacts,
    TrainingFacts,
    Unavailable,
)
from kbitcheck.models.batch import first_rows
from kbitcheck.models.given import Given
from kbitcheck.models.inputs import kinds
from kbitcheck.probes import adapters as adapter_probe
from kbitcheck.probes import digest, forwards, interleaving, layers, memory, snapshot, step, store, targets, twin
from kbitcheck.probes.call import SECOND, THIRD, arguments, call, place
from kbitcheck.programs import INTERLEAVED
from kbitcheck.quantization import Quantization
from kbitcheck.static.case import StaticCase, static_case
from kbitcheck.suite import CaseSpec


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


class Case:
    """Facts of one case, as ``kbitcheck.facts.Facts`` describes them."""

    live = False

    def __init__(self, spec: CaseSpec, prepare: Callable[..., Any], base: Base, *, patches: Sequence[str] = ()) -> None:
        self.spec = spec
        self._patches = patches
        self.prepare = prepare
        self._base = base
        self.case = spec.id
        self.profile = spec.profile
        self.freezes = spec.freezes
        self.checkpointing = spec.checkpointing

    def close(self) -> None:
        """Drop every model of the case."""
        for name in list(vars(self)):
            if isinstance(getattr(type(self), name, None), cached_property):
                del self.__dict__[name]

    # How the subject is asked

    @property
    def wanted(self) -> dict[str, Any]:
        """Keyword arguments of the case's call."""
        if self.checkpointing == "off":
            return {SECOND: False}
        if self.checkpointing == "default":
            return {SECOND: True}
        return {SECOND: True, THIRD: {"use_reentrant": self.checkpointing == "reentrant"}}

    @property
    def batch(self) -> step.Batch:
        return self._base.batch

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

    def _prepared_copy(self, **wanted: Any) -> Any:
        """A fresh base, prepared by the subject.

        Raises:
            Unavailable: preparation raised.
        """
        model = self._base.copy()
        returned, facts = call(self.prepare, model, **(wanted or self.wanted))
        if facts.raised:
            raise Unavailable(f"preparation raised {facts.raised} ({facts.raised_at})")
        return returned if isinstance(returned, nn.Module) else model

    def _needs_to_run(self) -> None:
        """What is left to judge of a prepared model that cannot run at all where its base can.

        Raises:
            NotApplicable: it cannot, which is KB210's to tell.
        """
        mixed = self.profile == "qlora"
        for f in self.forwards:
            # Fed embeddings, it fails where a gradient is cut, and runs all the same.
            fed = f.condition.startswith("train") and f.condition != forwards.EMBEDDED
            if f.raised and not f.base_raised and f.autocast is mixed and fed:
                raise NotApplicable(f"{CANNOT_RUN}{f.raised}")

    def _attached_copy(self, **wanted: Any) -> Attached:
        self._needs_to_run()
        return self._base.attach(self._prepared_copy(**wanted), self.spec)

    def _autocast(self) -> AbstractContextManager[Any] | None:
        make = self._base.autocast(self.profile)
        return make() if make else None

    # The base and the call

    @property
    def base(self) -> ModelFacts:
        return self._base.facts

    @cached_property
    def _called(self) -> tuple[Any, CallFacts, Mapping[str, bool]]:
        model = self._base.copy()
        flags = {}
        for index, (name, module) in enumerate(model.named_modules()):
            module.training = flags[name] = index % 3 != 1
        returned, facts = call(self.prepare, model, libraries=True, **self.wanted)
        return (returned if isinstance(returned, nn.Module) else model), facts, flags

    @property
    def call(self) -> CallFacts:
        return self._called[1]

    @property
    def training_flags(self) -> Mapping[str, bool]:
        """``training`` of each module of the model as it was handed over: a mixture."""
        return self._called[2]

    @property
    def _model(self) -> Any:
        model, facts, _ = self._called
        if facts.raised:
            raise Unavailable(f"preparation raised {facts.raised} ({facts.raised_at})")
        return model

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
    def step_raised(self) -> str:
        return self._raised(lambda: self.run)

    @cached_property
    def other_mode_raised(self) -> str:
        return self._raised(lambda: self.against_other_mode)

    def _raised(self, ask: Callable[[], Any]) -> str:
        """What computing a fact of the model with its adapters raises; empty if nothing."""
        _ = self._ready
        try:
            ask()
        except NotApplicable:  # no forward runs, which has been told
            return ""
        except Exception as error:
            return cause(error)
        return ""

    def _needs_the_libraries(self) -> None:
        """A witness proves nothing in libraries that the implementation changed, when it was imported or called.

        Raises:
            NotApplicable: it did.
        """
        if self._patches or any("." in name for name in self.call.process):
            raise NotApplicable(
                "the implementation patches the libraries, so that no base in this process is a witness"
            )

    @cached_property
    def unprepared(self) -> Case:
        self._needs_the_libraries()
        mode = self.checkpointing
        with suppress(NotApplicable, Unavailable):  # it may not run at all
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

    @property
    def _twins(self) -> twin.Twins:
        return self._base.twins(self.spec)

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
        try:
            mixed = self._mixed_backwards(self._attached_copy())
        except RuntimeError:
            if self._base_bears_autocast:
                raise
            return found
        return {**found, **{f"{name} (autocast, batch 1)": layer for name, layer in mixed.items()}}

    def _mixed_backwards(self, attached: Attached) -> Mapping[str, LayerBackward]:
        """Once more as trainers with mixed precision run it, and on a single row; on a copy, as an int8 layer casts its
        bias in place to whatever dtype comes in.
        """
        half = torch.autocast(next(iter(self.batch.values())).device.type, dtype=self._base.half)
        single = first_rows(self.batch, 1)
        if not getattr(getattr(self._base.pristine, "config", None), "is_encoder_decoder", False):
            del single["labels"]  # as who computes a loss of their own; a decoder's inputs are made from labels
        model, adapters = attached
        known = (self._base.weights, self._base.misread)
        return layers.backwards(model, single, adapters, *known, half, self._base.half)

    @cached_property
    def _base_bears_autocast(self) -> bool:
        """Whether a step under autocast runs in half precision and in float32: some models' own code has a dtype in mind."""
        try:
            for model in (self._base.copy(), self._base.wide()):
                self._mixed_backwards((model, {}))
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

    # Fresh copies

    @cached_property
    def _training(self) -> tuple[TrainingFacts, ModelFacts, ForwardFacts]:
        twins = self._twins
        model, adapters = self._attached_copy()
        before = snapshot.fingerprints(adapters)
        losses = twin.train(
            model,
            self.batch,
            adapters,
            learning_rate=twins.learning_rate,
            autocast=self._base.autocast(self.profile),
            seed=self.spec.seed,
        )
        after = snapshot.fingerprints(adapters)
        changed = frozenset(n for n in before if before[n] != after[n])
        facts = TrainingFacts(losses=losses, twin_losses=twins.losses, changed=changed)
        return facts, snapshot.snapshot(model, adapters), forwards.generate(model, self.batch)

    @property
    def training(self) -> TrainingFacts:
        return self._training[0]

    @property
    def trained(self) -> ModelFacts:
        return self._training[1]

    @property
    def generator(self) -> bool:
        return self._base.generator

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

    @cached_property
    def interleaved(self) -> Sequence[StepOutcome]:
        session = interleaving.Session(self.interleaving)
        return [session.do(name) for name in INTERLEAVED]

    @property
    def interleaving(self) -> interleaving.Subject:
        """What a session of steps in any order runs on."""
        return interleaving.Subject(
            make=self._attached_copy,
            prepare=lambda model: self.prepare(model, **arguments(self.prepare, self.wanted)),
            attach=lambda model: self._base.attach(model, self.spec),
            batch=self.batch,
            layers=tuple(self._base.weights),
            half=self._base.half,
            generator=self.generator,
            needs_autocast=self._base.autocast(self.profile) is not None,
            seed=self.spec.seed,
        )

    @property
    def generates(self) -> ForwardFacts:
        return self._training[2]

    @cached_property
    def forwards(self) -> Sequence[ForwardFacts]:
        def wide() -> Iterable[forwards.Forward]:
            return forwards.everywhere(self._base.wide(), self.batch, self._base.half)

        found = forwards.everywhere(self._prepared_copy(), self.batch, self._base.half)
        return forwards.compare(found, self._base.forwards, wide)

    @cached_property
    def left_by_evaluation(self) -> int:
        return memory.left_by_evaluation(self._prepared_copy(), self.batch, self._base.autocast(self.profile))

    @cached_property
    def function(self) -> FunctionFacts:
        self._needs_to_run()
        known = self._base.function(self.profile)
        found, routes = self._base.logits(self._prepared_copy(), self.profile)
        target = known.exact.logits
        keep = targets.unmoved(target, known.exact.routes, routes, known.original.routes, known.rounded.routes)
        return FunctionFacts(
            base_error=twin.root_mean_square_error(known.original.logits, target, keep),
            error=twin.root_mean_square_error(found, target, keep),
            twin_error=twin.root_mean_square_error(known.rounded.logits, target, keep),
            ulp=float(torch.finfo(torch.float32).eps),
            left_out=int((~keep).sum()),
            tokens=keep.numel(),
        )

    @cached_property
    def cost(self) -> CostFacts:
        return self._second_look[0]

    @cached_property
    def _second_look(self) -> tuple[CostFacts, ModelFacts, ModelFacts]:
        """A copy prepared while its memory is watched, then prepared again."""
        model = self._base.copy()
        for index, module in enumerate(model.modules()):
            module.training = index % 3 != 1
        kept: list[Any] = []

        def prepare(model: nn.Module) -> None:
            # Not by ``call``, whose copies of random states would count as the preparation's memory.
            try:
                returned = self.prepare(model, **arguments(self.prepare, self.wanted))
            except Exception as error:
                raise Unavailable(f"preparation raised {type(error).__name__}: {error} ({place(error)})") from error
            kept.append(returned if isinstance(returned, nn.Module) else model)

        cost = memory.cost(prepare, model)
        model = kept[-1]
        repeated = snapshot.snapshot(model)
        prepare(model)
        again = snapshot.snapshot(kept[-1])
        return cost, repeated, again

    @property
    def repeated(self) -> ModelFacts:
        return self._second_look[1]

    @property
    def prepared_again(self) -> ModelFacts:
        return self._second_look[2]

    @cached_property
    def switched_off(self) -> ModelFacts:
        """After one preparation, then ``disable_input_require_grads`` and checkpointing off."""
        model = self._prepared_copy()
        # transformers before 5 raises where nothing was enabled
        if hasattr(model, "_require_grads_hook") or hasattr(model, "_require_grads_hooks"):
            model.disable_input_require_grads()
        if self.base.can_checkpoint and hasattr(model, "gradient_checkpointing_disable"):
            step.quietly(model.gradient_checkpointing_disable)
        return snapshot.snapshot(model)

    @cached_property
    def default_call(self) -> CallFacts:
        return call(self.prepare, self._base.copy())[1]

    @cached_property
    def positional_call(self) -> CallFacts:
        return call(self.prepare, self._base.copy().train(), False)[1]

    @cached_property
    def refused(self) -> tuple[CallFacts, ModelFacts, ModelFacts]:
        """The call on the same architecture with checkpointing unsupported, with the model before and after."""
        model = self._base.copy()
        cls = type(model)
        model.__class__ = type(
            cls.__name__, (cls,), {"supports_gradient_checkpointing": False, "__module__": cls.__module__}
        )
        before = snapshot.snapshot(model)
        _, facts = call(self.prepare, model, **{SECOND: True})
        return facts, before, snapshot.snapshot(model)

    @cached_property
    def adapters_first(self) -> tuple[CallFacts, frozenset[str], frozenset[str]]:
        """The call on a model that already carries adapters: it, and the trainable adapters before and after."""
        library = "peft" if self.spec.adapters == "peft" or targets.peft_installed() else "reference"
        # PEFT refuses some targets, which is KB905's to tell.
        fit = [name for name in self._base.targets if name not in self.unfit_targets]
        try:
            model, adapters = adapter_probe.attach(
                self._base.copy(), fit or self._base.targets, library=library, rank=self.spec.rank, seed=self.spec.seed
            )
        except NotImplementedError as error:  # of some classes the embedding is not to be had
            raise NotApplicable(f"{library} cannot put adapters on this model: {cause(error)}") from error
        before = frozenset(n for n, p in adapters.items() if p.requires_grad)
        returned, facts = call(self.prepare, model, **self.wanted)
        after = returned if isinstance(returned, nn.Module) else model
        trainable = frozenset(n for n, p in after.named_parameters() if p.requires_grad)
        return facts, before, before & trainable

    @cached_property
    def honoured(self) -> tuple[Mapping[str, str], RunFacts, CallFacts]:
        """Checkpointing arguments that are not torch's defaults, and what reached torch when they were asked for."""
        self._needs_to_run()
        asked: dict[str, Any] = {"preserve_rng_state": False}
        if self.checkpointing != "default":
            asked["use_reentrant"] = self.checkpointing == "reentrant"
        if self.checkpointing == "non-reentrant":
            asked["determinism_check"] = "none"
        model = self._base.copy()
        wanted: dict[str, Any] = {SECOND: True, THIRD: asked}
        returned, called = call(self.prepare, model, **wanted)
        if called.raised:
            raise Unavailable(f"preparation with {asked} raised {called.raised}")
        model, adapters = self._base.attach(returned if isinstance(returned, nn.Module) else model, self.spec)
        with step.dropout_raised(model, 0.0):  # without the RNG state another mask, and other experts, are recomputed
            facts, _ = step.train_step(
                model, self.batch, adapters, seed=self.spec.seed, autocast=self._autocast(), watch=False
            )
        return {k: str(v) for k, v in asked.items()}, facts, called

    @cached_property
    def store(self) -> StoreFacts:
        def reload(folder: str) -> nn.Module:
            model = self._base.source.reload(folder, self.spec.device)
            returned = self.prepare(model, **arguments(self.prepare, self.wanted))
            return returned if isinstance(returned, nn.Module) else model

        return store.round_trip(
            self._prepared_copy(),
            self.base.state_keys,
            reload,
            lambda model: self._base.attach(model, self.spec),
            self.batch,
            self._base.autocast(self.profile),
        )

    @cached_property
    def unfit_targets(self) -> Mapping[str, str]:
        return targets.unfit(self._base.pristine, self._base.targets)

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
