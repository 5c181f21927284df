"""Facts that each need a copy of the base of their own: what runs or saves a model may change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable, cause
from kbitcheck.core.facts import (
    CANNOT_RUN,
    CallFacts,
    CostFacts,
    ForwardFacts,
    FunctionFacts,
    ModelFacts,
    RunFacts,
    StepOutcome,
    StoreFacts,
    TrainingFacts,
)
from kbitcheck.core.profile import PROMISES
from kbitcheck.observe.loaded import Attached, Base
from kbitcheck.observe.probes import adapters as adapter_probe
from kbitcheck.observe.probes import forwards, interleaving, memory, snapshot, step, store, targets
from kbitcheck.observe.probes.call import SECOND, THIRD, arguments, call
from kbitcheck.observe.step_sequences import INTERLEAVED
from kbitcheck.observe.twin import twins as twin


class Copies:
    """One implementation beside one base: how it is asked, and what comes of copies that it prepares."""

    def __init__(self, spec: CaseSpec, prepare: Callable[..., Any], base: Base, *, patches: Sequence[str] = ()) -> None:
        self.spec = spec
        self._patches = patches
        self.prepare = prepare
        self._base = base
        self.case = spec.id
        self.profile = spec.profile
        self.freezes = spec.freezes
        self.checkpointing = spec.checkpointing

    # How the subject is asked

    @property
    def base(self) -> ModelFacts:
        return self._base.facts

    @property
    def loaded(self) -> ModelFacts:
        return self._base.facts

    @property
    def batch(self) -> step.Batch:
        return self._base.batch

    @property
    def wanted(self) -> dict[str, Any]:
        """Keyword arguments of the case's call."""
        if self.checkpointing == "off":
            return {SECOND: False}
        if self.checkpointing == "default":
            return {SECOND: True}
        return {SECOND: True, THIRD: {"use_reentrant": self.checkpointing == "reentrant"}}

    def _autocast(self) -> AbstractContextManager[Any] | None:
        make = self._base.autocast(self.profile)
        return make() if make else None

    # Copies

    def _let_go(self) -> None:
        """Drop what else there is of a large model: more of it is coming."""

    def _copy(self) -> Any:
        """A fresh base."""
        self._let_go()
        return self._base.copy()

    def _prepared_copy(self) -> Any:
        """A fresh base, prepared by the subject.

        Raises:
            Unavailable: preparation raised.
        """
        model = self._copy()
        returned, facts = call(self.prepare, model, **self.wanted)
        if facts.raised:
            raise Unavailable(f"preparation raised {facts.raised}", failed=True, raised=facts.raised)
        return returned if isinstance(returned, nn.Module) else model

    def _needs_to_run(self) -> None:
        """What is left to judge of a prepared model that cannot run at all where its base can.

        Raises:
            Unavailable: it cannot, which is KB210's to tell.
        """
        mixed = PROMISES[self.profile].autocast
        for f in self.forwards:
            # Fed embeddings, it fails where a gradient is cut, and runs all the same.
            fed = f.condition.startswith("train") and f.condition != forwards.EMBEDDED
            if f.raised and not f.base_raised and f.autocast is mixed and fed:
                raise Unavailable(f"{CANNOT_RUN}{f.raised}", raised=f.raised)

    def _attached_copy(self) -> Attached:
        self._needs_to_run()
        return self._base.attach(self._prepared_copy(), self.spec)

    @property
    def _twins(self) -> twin.Twins:
        return self._base.twins(self.spec)

    # Each on a copy of its own

    @cached_property
    def forwards(self) -> Sequence[ForwardFacts]:
        def everywhere(model: nn.Module) -> Iterator[forwards.Forward]:
            return forwards.everywhere(model, self.batch, self._base.half)

        self._let_go()
        known = self._base.forwards  # first, so that its copy of the base is gone
        return forwards.compare(everywhere(self._prepared_copy()), known, lambda: everywhere(self._base.wide()))

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
    def left_by_evaluation(self) -> int:
        return memory.left_by_evaluation(self._prepared_copy(), self.batch, self._base.autocast(self.profile))

    @cached_property
    def _training(self) -> tuple[TrainingFacts, ModelFacts, ForwardFacts]:
        self._let_go()
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
    def generates(self) -> ForwardFacts:
        return self._training[2]

    @property
    def generator(self) -> bool:
        return self._base.generator

    @cached_property
    def interleaved(self) -> Sequence[StepOutcome]:
        return interleaving.Session(self.interleaving).run(INTERLEAVED)

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

    @cached_property
    def cost(self) -> CostFacts:
        return self._second_look[0]

    @cached_property
    def _second_look(self) -> tuple[CostFacts, ModelFacts, ModelFacts]:
        """A copy prepared while its memory is watched, then prepared again."""
        model = self._copy()
        for index, module in enumerate(model.modules()):
            module.training = index % 3 != 1
        kept: list[Any] = []

        def prepare(model: nn.Module) -> None:
            # Not by ``call``, whose copies of random states would count as the preparation's memory.
            try:
                returned = self.prepare(model, **arguments(self.prepare, self.wanted))
            except Exception as error:
                raise Unavailable(f"preparation raised {cause(error)}", failed=True) from error
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
        return call(self.prepare, self._copy())[1]

    @cached_property
    def positional_call(self) -> CallFacts:
        return call(self.prepare, self._copy().train(), False)[1]

    @cached_property
    def refused(self) -> tuple[CallFacts, ModelFacts, ModelFacts]:
        """The call on the same architecture with checkpointing unsupported, with the model before and after."""
        model = self._copy()
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
                self._copy(), fit or self._base.targets, library=library, rank=self.spec.rank, seed=self.spec.seed
            )
        except NotImplementedError as error:  # of some classes the embedding is not to be had
            raise Unavailable(f"{library} cannot put adapters on this model: {cause(error)}") from error
        before = frozenset(n for n, p in adapters.items() if p.requires_grad)
        returned, facts = call(self.prepare, model, **self.wanted)
        after = returned if isinstance(returned, nn.Module) else model
        trainable = frozenset(n for n, p in after.named_parameters() if p.requires_grad)
        return facts, before, before & trainable

    @cached_property
    def unfit_targets(self) -> Mapping[str, str]:
        return targets.unfit(self._base.pristine, self._base.targets)

    @cached_property
    def honoured(self) -> tuple[Mapping[str, str], RunFacts, CallFacts]:
        """Checkpointing arguments that are not torch's defaults, and what reached torch when they were asked for."""
        self._needs_to_run()
        asked: dict[str, Any] = {"preserve_rng_state": False}
        if self.checkpointing != "default":
            asked["use_reentrant"] = self.checkpointing == "reentrant"
        if self.checkpointing == "non-reentrant":
            asked["determinism_check"] = "none"
        model = self._copy()
        wanted: dict[str, Any] = {SECOND: True, THIRD: asked}
        returned, called = call(self.prepare, model, **wanted)
        if called.raised:
            raise Unavailable(f"preparation with {asked} raised {called.raised}", failed=True)
        model, adapters = self._base.attach(returned if isinstance(returned, nn.Module) else model, self.spec)
        with step.dropout_raised(model, 0.0):  # without the RNG state another mask, and other experts, are recomputed
            facts, _ = step.train_step(
                model, self.batch, adapters, seed=self.spec.seed, autocast=self._autocast(), watch=False
            )
        return {k: str(v) for k, v in asked.items()}, facts, called

    @cached_property
    def store(self) -> StoreFacts:
        def prepare(model: Any) -> Any:
            returned = self.prepare(model, **arguments(self.prepare, self.wanted))
            return returned if isinstance(returned, nn.Module) else model

        return store.round_trip(
            store.Subject(
                prepared=self._prepared_copy,
                base=self._copy,
                reload=lambda folder: self._base.source.reload(folder, self.spec.device),
                prepare=prepare,
                attach=lambda model: self._base.attach(model, self.spec),
                autocast=self._base.autocast(self.profile),
            ),
            self.base.state_keys,
            self.batch,
        )
