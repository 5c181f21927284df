"""A loaded model, never run, and what is derived from it alone: twins, original weights, forwards, adapter targets."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any, NamedTuple, Self, TypeVar, cast

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core import machine
from kbitcheck.core.cases import CaseSpec, Profile
from kbitcheck.core.errors import Unavailable, cause
from kbitcheck.core.facts import ForecastFacts
from kbitcheck.core.profile import PROMISES
from kbitcheck.core.training import Training
from kbitcheck.models.cut import NoCut
from kbitcheck.models.inputs.text import first_rows
from kbitcheck.models.parametrized import deep_copy
from kbitcheck.models.sources.live import LiveModel
from kbitcheck.models.sources.resolve import Source, source_of
from kbitcheck.observe.blockwise.oracle import Comparison, Twin, compare
from kbitcheck.observe.blockwise.record import BlockCall
from kbitcheck.observe.configured import CaseAdapters
from kbitcheck.observe.cut import ProvenCut, proven_cut
from kbitcheck.observe.forecast import fitting
from kbitcheck.observe.forecast import predict as forecast
from kbitcheck.observe.internals import tree_flatten
from kbitcheck.observe.probes import adapters as adapter_probe
from kbitcheck.observe.probes import digest, forwards, layers, routers, snapshot, step
from kbitcheck.observe.probes.adapters import Attached
from kbitcheck.observe.twin import patches
from kbitcheck.observe.twin import twins as twin
from kbitcheck.observe.twin.low_rank import by_definition

T = TypeVar("T")
Attach = Callable[[nn.Module, CaseSpec], Attached]
Numbers = Mapping[str, torch.Tensor] | None


class Function(NamedTuple):
    """Logits of a base: in float64, of the base as it is, and of the twin in the preparation's own dtypes."""

    exact: routers.Routed
    original: routers.Routed
    rounded: routers.Routed


class LoadedCut(NamedTuple):
    """A cut with its proof, and its model as loaded."""

    proof: ProvenCut
    loaded: "Loaded"


class Loaded:
    """A quantized model as loaded, never run, with all that is derived from it alone and shared by cases.

    ``attach`` puts adapters on a copy (by default the spec's, on the target layers, and thaws what ``training`` names);
    ``twin_errors`` are the exceptions by which the float64 twin says that the model's code does not run in float64.
    """

    copies = True  # whether a model may be copied
    reads_labels = False  # whether a caller's own function makes the loss, maybe of what the model does with labels
    patched = False  # whether a caller may have put something over its arithmetic, which its twins leave out
    of_large = False  # whether it is a cut of a large model
    lease: object = None  # another object whenever the base that cases hold is taken back

    def __init__(
        self,
        model: Any,
        source: Source,
        spec: CaseSpec,
        *,
        batch: step.Batch | None = None,
        attach: Attach | None = None,
        training: Training | None = None,
        twin_errors: tuple[type[Exception], ...] = (RuntimeError,),
    ) -> None:
        self.pristine = model
        self.source, self.quant = source, Quantization.parse(spec.quant)
        self.facts = snapshot.snapshot(model)
        self.state_keys = snapshot.state_keys(model)  # before any implementation runs, which may patch how modules save
        drawn: dict[str, Any] = {"batch": spec.batch, "seq_len": spec.seq_len, "seed": spec.seed}
        self.batch = source.batch(model, **drawn) if batch is None else batch
        self.targets = [] if attach else adapter_probe.target_layers(model, spec.targets)
        self.unfit_targets = adapter_probe.unfit(model, self.targets)
        self.weights = layers.Weights(model)
        self._own_attach, self.training, self._twin_errors = attach, training or Training(), twin_errors
        self.adapters = CaseAdapters(model, self.targets, self.training, self)
        self.attach: Attach = attach or self.adapters.attach
        self._results: dict[tuple[Any, ...], Any] = {}
        self._no_twin: dict[str, str] = {}  # why there is none, by adapters
        if not self.copies and not attach:
            self.adapters.draw(spec)  # as long as the caller's model is in no one's hands

    @classmethod
    def from_source(cls, source: Source, spec: CaseSpec, *, spoil: Callable[[Any], None] | None = None) -> Self:
        """The spec's model from a source; ``spoil`` damages it first."""
        model = source.load(Quantization.parse(spec.quant), spec.device)
        if spoil is not None:
            spoil(model)
        return cls(model, source, spec)

    @property
    def remote_code(self) -> bool:
        """Whether the model's code comes from its repository."""
        return self.source.remote_code or bool(getattr(getattr(self.pristine, "config", None), "auto_map", None))

    @property
    def large(self) -> bool:
        """True if forward results are recomputed on demand, not cached, to save memory."""
        return self.facts.nbytes > machine.LARGE_BYTES

    def _room(self) -> None:
        """Before one more model is made."""
        if self.large or self.of_large:
            machine.return_free_pages()

    def copy(self) -> Any:
        """A fresh base."""
        self._room()
        return deep_copy(self.pristine)

    def reload(self, folder: str, device: str) -> Any:
        """A model of this kind as ``save_pretrained`` left it in ``folder``."""
        return self.source.reload(folder, device)

    def require_step(self) -> None:
        """Raise ``Unavailable`` if the model may not run."""

    def own_copy(self) -> Any:
        """A fresh base that shares nothing, so that its tensors are freed when they are replaced."""
        return self.copy()

    def original(self) -> Any:
        """The base as loaded, to read and never to run."""
        return self.pristine

    @property
    def single(self) -> step.Batch:
        """The batch's first row alone, without a mask."""
        return {k: v for k, v in first_rows(self.batch, 1).items() if k != "attention_mask"}

    @cached_property
    def compute(self) -> torch.dtype:
        """The dtype quantized layers compute in: float32 where they follow prepared (float32) inputs, as int8 does."""
        return next((d for d in backends.compute_dtypes(self.pristine) if d is not None), torch.float32)

    def cut(self, spec: CaseSpec) -> "LoadedCut":
        """A cut of the model, proven to be one; raises ``NoCut`` if there is none, or none is worth its price."""
        if spec.cut == "never" or (spec.cut == "if-large" and not self.large):
            raise NoCut("")
        made = self._computed_once(("cut", spec.targets), lambda: self._proven_cut(spec), small=True)
        if isinstance(made, NoCut):
            raise made
        return made

    def _proven_cut(self, spec: CaseSpec) -> "LoadedCut | NoCut":
        self.require_step()
        try:
            proof = proven_cut(self.original(), self.batch)
        except NoCut as reason:
            return reason
        # Of a caller's own model, whose tensors change as it is prepared and stepped, the cut has copies.
        model = proof.cut.model if self.copies else copy.deepcopy(proof.cut.model)
        how: dict[str, Any] = {"attach": self._own_attach, "training": self.training, "twin_errors": self._twin_errors}
        loaded = Loaded(model, self.source, spec, batch=self.batch, **how)
        loaded.patched, loaded.of_large = self.patched, self.large
        return LoadedCut(proof, loaded)

    def twins(self, spec: CaseSpec) -> twin.Twins:
        """Twins under the spec's profile and adapters."""
        compute = partial(self._in_float64, lambda: self._compute_twins(spec), spec.adapters)
        return self._computed_once(("twins", spec.profile, *spec.attached), compute, small=True)

    def _in_float64(self, compute: Callable[[], T], adapters: str = "") -> T:
        """What ``compute`` returns. It runs a float64 twin; where the code of model or adapters does not, it is tried once."""
        self.require_step()
        why = self._no_twin.get("") or self._no_twin.get(adapters)
        if not why:
            try:
                return compute()
            except self._twin_errors as error:
                if isinstance(error, torch.OutOfMemoryError) and torch.OutOfMemoryError not in self._twin_errors:
                    raise
                why = self._no_twin[adapters] = f"the float64 twin of this model does not run: {cause(error)}"
        raise Unavailable(why)

    def forecast(self, spec: CaseSpec) -> ForecastFacts:
        """Bytes predicted from the model's configuration; those of training steps for ``kbitcheck model`` alone."""
        if isinstance(self.source, LiveModel):
            raise Unavailable("a live model: there is nothing to predict it from")
        model = self.source.meta(self.quant)
        facts = snapshot.snapshot(model)
        weights = forecast.of_weights(model, facts, spec, self.source.notes)
        return weights if spec.static == "never" else fitting.with_steps(weights, self.source, model, facts, spec)

    @property
    def half(self) -> torch.dtype:
        """What autocast runs in: the compute dtype where it is half, else bfloat16."""
        return self.compute if self.compute in (torch.float16, torch.bfloat16) else torch.bfloat16

    @property
    def forwards(self) -> forwards.Everywhere:
        """The unprepared base under every condition."""
        return self._computed_once(("forwards",), lambda: forwards.Everywhere(self.copy(), self.batch, self.half))

    def witness(self, spec: CaseSpec, make: Callable[[], T]) -> T:
        """The base's case of a spec that no implementation has a part in; made once, but of a large model."""
        return self._computed_once(("witness", spec), make)

    def _computed_once(self, key: tuple[Any, ...], compute: Callable[[], T], *, small: bool = False) -> T:
        """What ``compute`` returns, kept under the key; that of a large model is not, unless it is ``small``."""
        if key in self._results:
            return cast(T, self._results[key])
        result = compute()
        if small or not self.large:
            self._results[key] = result
        return result

    def once(self, name: str, function: Callable[..., Any], compute: Callable[[], T]) -> T:
        """What ``compute`` returns of an implementation, whatever the mode of checkpointing; kept for its other cases."""
        return self._computed_once((name, function), compute, small=True)

    def _float64(self) -> nn.Module:
        made = self._as_its_classes_compute(twin.float64(self.original(), self.weights))
        return patches.keep_float64(made) if self.patched else made

    def _same_dtype(self, profile: str) -> nn.Module:
        return self._as_its_classes_compute(twin.same_dtype(self.original(), self.weights, profile))

    def _as_its_classes_compute(self, made: nn.Module) -> nn.Module:
        return patches.remove(made, self.pristine) if self.patched else made

    def wide(self) -> nn.Module:
        """The model as it were had it never been quantized or in half precision: all of it float32."""
        self._room()
        # Not its own ``float``, which refuses where layers were quantized.
        return nn.Module.float(self._same_dtype("peft"))

    @cached_property
    def generator(self) -> bool:
        """Whether the unprepared base generates: of some shapes transformers itself cannot make the cache."""
        self.require_step()
        can = getattr(self.pristine, "can_generate", None)
        return bool(can and can()) and not forwards.generate(self.copy(), self.batch).raised

    def function(self, profile: Profile) -> Function:
        """What a prepared model's logits are measured against."""
        return self._computed_once(("function", profile), lambda: self._compute_function(profile))

    def _compute_function(self, profile: Profile) -> Function:
        exact = self._in_float64(lambda: self.logits(self._float64()))
        rounded = self.logits(self._same_dtype(profile), profile)
        try:
            original = self.logits(self.copy())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise Unavailable(f"the unprepared base does not run: {cause(error)}") from error
        return Function(exact=exact, original=original, rounded=rounded)

    def logits(self, model: nn.Module, profile: Profile | None = None) -> routers.Routed:
        """The model's logits on the base's batch, as it runs under a profile (none: as it is)."""
        run = partial(forwards.forward_logits, model, self.batch, self.autocast(profile) if profile else nullcontext)
        return routers.Routed(*routers.routed(model, run))

    def autocast(self, profile: str, *, caching: bool = True) -> step.Autocast:
        """How training runs under a profile: mixed dtypes need autocast.

        Autocast keeps the weights that it casts until its end (``caching``): they are no activations.
        """
        if not PROMISES[profile].autocast:
            return nullcontext
        return partial(torch.autocast, step.device(self.batch).type, dtype=self.half, cache_enabled=caching)

    def block_by_block(
        self, spec: CaseSpec, run: step.Step, calls: Sequence[BlockCall], batch: step.Batch, numbers: Numbers = None
    ) -> Comparison:
        """A recorded plain step of the base, prepared and with the spec's adapters (of other ``numbers``), beside its twins."""
        key = ("blocks", spec.profile, *spec.attached, *_bits(run, calls))

        def compared() -> Comparison:
            self._room()
            comparison = compare(run, calls, (self._exact(spec), self._rounded(spec)), batch, spec.seed, numbers)
            self._room()
            if self.patched:
                twin.require_numbers(comparison.facts.parts[""].gaps["loss"].size)
            return comparison

        return self._computed_once(key, partial(self._in_float64, compared, spec.adapters), small=True)

    def _exact(self, spec: CaseSpec) -> Twin:
        return self._computed_once(("exact", *spec.attached), lambda: self._make_exact(spec), small=True)

    def _make_exact(self, spec: CaseSpec) -> Twin:
        model, adapters = by_definition(self.attach(self._float64(), spec))
        for adapter in adapters.values():
            adapter.data = adapter.data.double()
        return Twin(model, adapters, torch.float64)

    def _rounded(self, spec: CaseSpec) -> Twin:
        key = ("rounded", spec.profile, *spec.attached)
        return self._computed_once(key, lambda: self._make_rounded(spec), small=True)

    def _make_rounded(self, spec: CaseSpec) -> Twin:
        model, adapters = by_definition(self.attach(self._same_dtype(spec.profile), spec))
        if not any(p.requires_grad for p in adapters.values()):
            raise Unavailable("no adapter is trainable (KB102)")
        return Twin(model, adapters, autocast=self.autocast(spec.profile))

    def _compute_twins(self, spec: CaseSpec) -> twin.Twins:
        def gradients(side: Twin) -> list[step.Gradients]:
            settings: dict[str, Any] = {"seed": spec.seed, "watch": False, "autocast": side.autocast or nullcontext}
            steps = [step.train_step(side.model, b, side.adapters, **settings) for b in (self.batch, self.single)]
            if self.patched:  # what a caller put over a model may make a twin that says nothing
                twin.require_numbers(*(each.facts.loss for each in steps))
            return [each.gradients for each in steps]

        whole, single = map(twin.Pair, gradients(self._exact(spec)), gradients(self._rounded(spec)))
        return twin.Twins(whole=whole, single=single)


def _bits(run: step.Step, calls: Sequence[BlockCall]) -> tuple[str, ...]:
    """Digests of all that a comparison reads of a recorded step; what is no tensor counts by its text."""
    read = [(c.block, c.leaves, c.outputs, c.entering, c.leaving, c.choices, c.returned, c.autocast) for c in calls]
    leaves, structure = tree_flatten([run.facts.loss_bits, run.gradients, read])
    return (*map(digest.of, leaves), str(structure))


_cache: OrderedDict[tuple[Any, ...], Loaded] = OrderedDict()


def loaded_model(spec: CaseSpec) -> Loaded:
    """The spec's model; the last two are kept, as cases come grouped by model and quantization."""
    key = (
        spec.model, spec.quant, spec.device, spec.batch, spec.seq_len, spec.seed, spec.targets, spec.random_weights,
        spec.dtype, spec.revision,
    )  # fmt: skip
    if key not in _cache:
        while len(_cache) > 1:
            _cache.popitem(last=False)
        _cache[key] = Loaded.from_source(source_of(spec), spec)
    _cache.move_to_end(key)
    return _cache[key]
