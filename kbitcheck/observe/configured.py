"""Adapters of any configuration of PEFT's, with the same numbers on every copy of one base."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.core.adapters import fields
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable, UsageError, cause
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.core.training import Training
from kbitcheck.observe.meant_to_train import CONSTANTS, owned, thaw, with_own_numbers
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.probes.adapters import SPREAD, Attached, attach, linear_layers, noise

ROTATIONS = ("OFT", "BOFT")  # whose size is that of blocks; a rank is another way to name it
# Of what starts at other numbers than zero and is not drawn, each is multiplied by one and this much noise.
STIR = 0.1


def configuration(fields: Mapping[str, Any], layers: Sequence[str], rank: int) -> Any:
    """A configuration object of PEFT's; ``layers`` and ``rank`` are used where it leaves them open.

    Raises:
        UsageError: PEFT is not installed or has no such type or field.
    """
    try:
        from peft import PeftType, get_peft_config
    except ImportError:
        raise UsageError("adapters of a configuration need peft: pip install peft") from None
    kind = str(fields["peft_type"])
    types = {each.name for each in PeftType}
    if kind not in types:
        raise UsageError(f"peft has no adapters of type {kind!r}{did_you_mean(kind, types)}")
    try:
        blank: Any = get_peft_config({"peft_type": kind})
        names = {each.name for each in dataclasses.fields(blank)}
    except (TypeError, ValueError):  # it wants more than its type
        names = {*fields}
    if misspelt := [name for name in fields if name not in names]:
        raise UsageError(f"peft's {kind} has no field {misspelt[0]!r}{did_you_mean(misspelt[0], names)}")
    filled = dict(fields)
    if "target_modules" in names and "target_parameters" not in fields:
        filled.setdefault("target_modules", list(layers))
    if "r" in names and kind not in ROTATIONS:
        filled.setdefault("r", rank)
    if kind == "LORA":
        filled.setdefault("lora_alpha", 2 * int(filled["r"]))
    try:
        return get_peft_config(filled)
    except (ImportError, TypeError, ValueError, KeyError) as error:
        raise UsageError(f"peft refuses these adapters: {cause(error)}", cause=cause(error)) from error


def put_on(model: nn.Module, config: Any, seed: int) -> Attached:
    """The model under PEFT, and all parameters that PEFT's layers own and that its configuration trains, at their start."""
    from peft import get_peft_model

    with switches.seeded(seed, {}):
        wrapped: Any = get_peft_model(model, config)
    constants = {n: p for n, p in wrapped.named_parameters() if CONSTANTS & set(n.split("."))}
    for constant in constants.values():
        constant.requires_grad_(False)
    return Attached(wrapped, {n: p for n, p in owned(wrapped).items() if n not in constants})


class Base(Protocol):
    """A loaded model, as ``observe.loaded.Loaded``."""

    @property
    def batch(self) -> step.Batch: ...

    @property
    def half(self) -> torch.dtype: ...

    def copy(self) -> Any: ...


def _raised_by(model: nn.Module, base: Base, autocast: step.Autocast) -> str:
    """What two forwards in train mode raise."""
    model.train()
    try:
        with torch.no_grad(), switches.seeded(0, base.batch), autocast():
            for _ in range(2):
                model(**step.feed(model, base.batch))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return cause(error)
    return ""


class Configured:
    """The adapters of a case's configuration on the named layers, which are drawn once, on a copy of the base as loaded.

    Steps have PEFT's usual start in place of one that is computed of the base's weights, which PEFT may
    change for it: what is drawn replaces it.
    """

    def __init__(self, fields: Mapping[str, Any], layers: Sequence[str], spec: CaseSpec, base: Base) -> None:
        self._spec, self._base, self._layers = spec, base, layers
        self._fields = fields
        of_weights = isinstance(fields.get("init_lora_weights"), str)
        self._stepped = {n: v for n, v in fields.items() if n != "init_lora_weights" or not of_weights}
        configuration(fields, layers, spec.rank)  # raises where a field is wrong

    @cached_property
    def values(self) -> Mapping[str, torch.Tensor]:
        """The numbers of each adapter: its start, stirred, or numbers that are drawn where it is zero or random."""
        first, second = (self._start(seed) for seed in (self._spec.seed, self._spec.seed + 1))
        return {name: self._value(name, start, second[name]) for name, start in first.items()}

    def _start(self, seed: int) -> Mapping[str, torch.Tensor]:
        model = self._base.copy()
        recast = {
            id(m.bias): backends.arithmetic(m).bias_after_forward(m).dtype
            for _, m in backends.quantized_layers(model)
            if getattr(m, "bias", None) is not None
        }
        try:
            wrapped, adapters = put_on(model, self._config(), seed)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # PEFT checks what it is asked for where it comes to it
            why = cause(error)
            raise UsageError(f"peft does not put these adapters on this model: {why}", cause=why) from error
        if not adapters:
            raise UsageError("these adapters have no parameter on this model")
        starts = {
            name: p.detach().to("cpu", recast.get(id(p), torch.float32), copy=True).float()
            for name, p in adapters.items()
        }
        if seed == self._spec.seed and (refused := self._refused(wrapped)):
            raise UsageError(f"peft does not run these adapters on this model: {refused}", cause=refused)
        return starts

    def _refused(self, wrapped: nn.Module) -> str:
        """What one of two forwards of the base raises with the adapters, under autocast too, and not without; "" where they run."""
        raised = _raised_by(wrapped, self._base, nullcontext)
        if not raised or _raised_by(self._base.copy(), self._base, nullcontext):
            return ""
        # Adapters in float32 beside a base in half precision need autocast until a preparation casts the norms.
        again = put_on(self._base.copy(), self._config(), self._spec.seed).model
        half = partial(torch.autocast, step.device(self._base.batch).type, dtype=self._base.half)
        return raised if _raised_by(again, self._base, half) else ""

    def _value(self, name: str, start: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if not start.any() or not torch.equal(start, other):
            drawn: torch.Tensor = SPREAD * noise(name, start, self._spec.seed) / start.shape[-1] ** 0.5
            return drawn
        stirred: torch.Tensor = start * (1 + STIR * noise(name, start, self._spec.seed))
        return stirred

    def _config(self) -> Any:
        # PEFT fills a configuration in as it attaches it.
        return configuration(self._stepped, self._layers, self._spec.rank)

    @property
    def prompts(self) -> bool:
        """Whether the adapters are virtual tokens."""
        return bool(getattr(self._config(), "is_prompt_learning", False))

    def start_on(self, model: nn.Module) -> nn.Module:
        """The model with the adapters as the configuration starts them; ``Unavailable`` where PEFT refuses to on this base."""
        config = configuration(self._fields, self._layers, self._spec.rank)
        try:
            return put_on(model, config, self._spec.seed).model
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._fields == self._stepped:  # the steps show it
                raise
            raise Unavailable(f"peft refuses this start: {cause(error)}") from error

    def attach(self, model: nn.Module) -> Attached:
        """The adapters on a copy of the base, prepared or not, or on its twin."""
        values = self.values
        try:
            wrapped, adapters = put_on(model, self._config(), self._spec.seed)
        except RuntimeError as error:  # of a twin, that its own code does not run would be told for other adapters, too
            raise Unavailable(f"peft does not put these adapters on this model: {cause(error)}") from error
        if strange := [n for n, p in adapters.items() if n not in values or values[n].shape != p.shape]:
            raise Unavailable(f"on another copy of the base, {strange[0]} is not there, or has another shape")
        switches.set_dropout(wrapped, 0.0)  # or no step compares with another; KB307 raises it
        for name in adapters:
            with_own_numbers(wrapped, name)
        adapters = {name: p for name, p in wrapped.named_parameters() if name in adapters}
        for name, parameter in adapters.items():
            parameter.data.copy_(values[name])
        return Attached(wrapped, adapters)


class CaseAdapters:
    """The adapters of cases of one base: a library's plain LoRA, or those of a configuration, whose numbers are kept."""

    def __init__(self, model: nn.Module, layers: Sequence[str], training: Training, base: Base) -> None:
        self._layers, self._training, self._base = layers, training, base
        self._linears = linear_layers(model, layers)
        self._configured: dict[tuple[Any, ...], Configured] = {}

    def configured(self, spec: CaseSpec) -> Configured | None:
        """The adapters of the case's configuration; None for a library's plain LoRA."""
        if (named := fields(spec.adapters)) is None:
            return None
        key = (spec.adapters, spec.rank, spec.seed)
        if key not in self._configured:
            self._configured[key] = Configured(named, self._linears, spec, self._base)
        return self._configured[key]

    def draw(self, spec: CaseSpec) -> None:
        """Draw the numbers of a configuration's adapters now."""
        if (configured := self.configured(spec)) is not None:
            _ = configured.values

    def attach(self, model: nn.Module, spec: CaseSpec) -> Attached:
        """The case's adapters on a model, with the same numbers each time; what the caller says trains beside them does, too."""
        if (configured := self.configured(spec)) is not None:
            wrapped, adapters = configured.attach(model)
        else:
            how: dict[str, Any] = {
                "library": spec.adapters,
                "rank": spec.rank,
                "scaling": spec.scaling,
                "seed": spec.seed,
            }
            wrapped, adapters = attach(model, self._layers if spec.layers is None else spec.layers, **how)
        return Attached(wrapped, {**adapters, **thaw(wrapped, self._training)})
