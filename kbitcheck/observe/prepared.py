"""The facts of a model as it stands, prepared by someone else, before or in the middle of training.

The steps are those of the caller's own object, which is afterwards bitwise what it was.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.core.facts import Fact, ForwardFacts, ModelFacts, QuantizerFacts, RunFacts, WatchedRun
from kbitcheck.core.facts.case import OpenCase
from kbitcheck.core.facts.recipe import default_rate
from kbitcheck.core.training import Training
from kbitcheck.models.load import quiet
from kbitcheck.models.sources.live import LiveModel
from kbitcheck.observe import figures
from kbitcheck.observe.case import Case, facts_of
from kbitcheck.observe.lent import Lent
from kbitcheck.observe.meant_to_train import declared, owned, require_declared, with_own_numbers
from kbitcheck.observe.outputs import Outputs
from kbitcheck.observe.probes import adapters as adapter_probe
from kbitcheck.observe.probes import switches
from kbitcheck.observe.probes.adapters import Attached
from kbitcheck.observe.probes.quantizer import of_model
from kbitcheck.observe.probes.snapshot import snapshot
from kbitcheck.observe.recipe import recipe_of_prepared, settled
from kbitcheck.observe.stepped import Stepped
from kbitcheck.observe.trained import Descended, Trained
from kbitcheck.observe.watch.own_steps import optimizer_steps

GONE = "needs the state before preparation, or the call itself: `kbitcheck impl` judges it"
FROM_STEPS = {
    *facts_of(Stepped), *facts_of(Descended), *facts_of(Trained), "compute_ulp", "half_ulp", "generator", "unfit_targets",
    "bias_after_forward", "cut",
}  # fmt: skip


@contextmanager
def undisturbed(*, threads: int) -> Iterator[None]:
    """Say nothing, and compile nothing.

    bitsandbytes compiles a kernel for each odd shape on a CPU: half a minute a model. On a tiny one more threads than
    one only wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.compiler.set_stance("force_eager"), quiet():
            yield
    finally:
        torch.set_num_threads(before)


class _Prepared(Lent):
    """A model as it stands, with its own adapters or, where it has none, the spec's."""

    def __init__(self, model: Any, spec: CaseSpec, restore: Callable[[], None], training: Training) -> None:
        dtypes = _dtypes_in_training(model, owned(model, declared(model, training)))
        super().__init__(
            model,
            spec,
            restore,
            training=training,
            attach=functools.partial(attach_own, dtypes) if dtypes else None,
            twin_errors=(AttributeError, TypeError, ValueError, RuntimeError, torch.OutOfMemoryError),
        )

    def copy(self) -> Any:
        model = super().copy()
        switches.set_dropout(model, 0.0)  # or no step compares with another; KB307 raises it
        return model


def _dtypes_in_training(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, torch.dtype]:
    """The dtypes of trained parameters once the model has run: a quantized layer may recast its own bias."""
    layers = [m for _, m in backends.quantized_layers(model) if getattr(m, "bias", None) is not None]
    recast = {id(m.bias): backends.arithmetic(m).bias_after_forward(m).dtype for m in layers}
    return {name: recast.get(id(p), p.dtype) for name, p in trained.items()}


def attach_own(dtypes: Mapping[str, torch.dtype], model: nn.Module, spec: CaseSpec) -> Attached:
    """The model with the adapters that it carries, by name and dtype; zeros are drawn anew, or half of the gradients would be zero."""
    here = {name for name, _ in model.named_parameters()} & dtypes.keys()  # a cut has some of them
    for name in here:
        with_own_numbers(model, name, dtypes[name])
    adapters = {name: p for name, p in model.named_parameters() if name in dtypes}
    adapter_probe.draw({name: p for name, p in adapters.items() if not p.any()}, spec.seed)
    return Attached(model, adapters)


class _NoPreparation(Outputs):
    """Outputs of a model that nothing prepares: they are its own."""

    forwards = Fact[Sequence[ForwardFacts]](lambda self: ())

    @property
    def training_forwards(self) -> Sequence[ForwardFacts]:
        return ()


class _Steps(Case):
    """The case of a preparation that does nothing: a prepared model's own steps."""

    outputs = _NoPreparation


class PreparedCase(OpenCase):
    """The facts that a model still shows which someone else prepared: what is read off it, and its own steps.

    ``training`` is how the model trains. Steps change the model until ``restore`` is called, which puts it back to what it
    was; no step is taken where ``no_step`` gives a reason.
    """

    def __init__(
        self,
        spec: CaseSpec,
        model: Any,
        training: Training,
        *,
        restore: Callable[[], None],
        no_step: str = "",
    ) -> None:
        self._model = model
        self._training = training
        self._restore = restore
        self._no_step = no_step
        require_declared(model, training)
        parts = declared(model, training)
        self.prepared = snapshot(model, owned(model, parts), declared=parts)
        recipe = recipe_of_prepared(model, self.prepared) if spec.profile == "auto" else None
        super().__init__(settled(spec, recipe), recipe)

    def compute(self, name: str) -> Any:
        """The fact of that name, from the model's steps."""
        if name not in FROM_STEPS:
            raise Unavailable(GONE)
        return getattr(self._steps, name)

    @Fact
    def _steps(self) -> Case:
        if self._no_step:
            raise Unavailable(self._no_step)
        return _Steps(self.spec, lambda model: model, _Prepared(self._model, self.spec, self._restore, self._training))

    @Fact
    def base(self) -> ModelFacts:
        """The model without its adapters; whether it checkpointed before cannot be seen."""
        return dataclasses.replace(
            self.prepared,
            parameters={n: p for n, p in self.prepared.parameters.items() if not p.adapter},
            modules={n: dataclasses.replace(m, checkpointing=None) for n, m in self.prepared.modules.items()},
        )

    @Fact
    def wrapped(self) -> ModelFacts:
        if any(p.adapter for p in self.prepared.parameters.values()):
            return self.prepared
        return self._steps.wrapped

    quantizer = Fact[QuantizerFacts](lambda self: of_model(self._model, self.spec.quant, self.base))
    remote_code = Fact[bool](lambda self: LiveModel.of(self._model).remote_code)

    @Fact
    def run(self) -> RunFacts:
        """A step of the copy, with the gradients that base parameters of the model itself hold already."""
        run = self._steps.run
        held = [n for n, p in self.prepared.parameters.items() if p.has_grad and not p.adapter]
        return dataclasses.replace(run, base_grads=tuple(dict.fromkeys((*run.base_grads, *held))))

    @Fact
    def watched(self) -> WatchedRun:
        """Two steps of the caller's optimizer, or of an assumed one, on the model with its own numbers."""
        if self._no_step:
            raise Unavailable(self._no_step)
        base = self._steps._loaded
        model = base.copy()
        rate = self._training.rate or default_rate(self.recipe)
        training = dataclasses.replace(self._training, rate=rate)
        return optimizer_steps(model, base.batch, training, autocast=base.autocast(self.profile))

    def cut_behind(self, reads: Set[str]) -> str:
        return self._steps.cut_behind(reads) if "_steps" in self.computed else ""

    def summary(self) -> dict[str, Any]:
        """Figures of a report, as ``Case.summary``."""
        if "_steps" not in self.computed:  # where nothing ran, nothing was fed
            return figures.summary(self, {"prepared"}, batch=None)
        return figures.summary(self, {"prepared", *self.computed, *self._steps.computed}, batch=self._steps.batch)
