"""Uses of a prepared model beside those of a base that nothing prepared, in the same dtypes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.conditions import chosen, share
from kbitcheck.core.errors import Raised
from kbitcheck.core.facts import Distance, Passes, UseFacts
from kbitcheck.observe import internals
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.uses import beforehand, between, calls, module, numbers, optimizers, surface, training
from kbitcheck.observe.uses.subject import USES, Outcome, Subject, Value, done

MODULES = (
    beforehand,
    between,
    calls,
    module,
    numbers,
    optimizers,
    surface,
    training,
)  # whose import registers the uses

ONE_USE = Passes(forwards=2, backwards=2, copies=2, calls=1)  # a step of the prepared model and one of the base


# Of few architectures: in a suite that shares its conditions another one's case would have it, and none of theirs.
OF_FEW = frozenset({"an encoder that ran before"})


def drawn(spec: CaseSpec) -> Sequence[str]:
    """The uses that a case looks at."""
    names = chosen(spec.conditions, USES, entropy=spec.entropy, seed=spec.seed)
    return sorted({*names, *OF_FEW}) if share(spec.conditions) else names


def side_by_side(preparation: Preparation, names: Sequence[str]) -> Iterator[UseFacts]:
    """What came of each use, beside the base's."""
    for name in names:
        yield from _one(preparation, name)


def _one(preparation: Preparation, name: str) -> Iterator[UseFacts]:
    model = preparation.prepared_copy()
    like = _Like(
        {n: p.dtype for n, p in model.named_parameters()}, switches.mode_of(model), internals.checkpoint_keywords(model)
    )
    mine = _done(name, Subject(model, preparation, preparation.copy, preparation.apply))
    del model

    def of_base(make: Callable[[], Any]) -> Outcome:
        return _done(name, Subject(like.base(make()), preparation, make, like.base))

    base = preparation.loaded.once(f"{name}, {like}", _done, lambda: of_base(preparation.copy))
    yield from beside(name, mine, base, lambda: of_base(preparation.loaded.wide))


class _Like(NamedTuple):
    """What a base has in common with the prepared model: dtypes, and how transformers checkpoints it."""

    dtypes: Mapping[str, torch.dtype]
    mode: str
    keywords: Mapping[str, Any] | None

    def base(self, model: Any, keywords: Mapping[str, Any] | None = None) -> Any:
        """The base, frozen; what is narrower than in the prepared model is cast. No preparation's ``keywords`` matter."""
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            dtype = self.dtypes.get(name, parameter.dtype)
            if parameter.is_floating_point() and dtype.itemsize >= parameter.dtype.itemsize:
                parameter.data = parameter.data.to(dtype)
        if self.mode != "off":
            switches.quietly(lambda: model.gradient_checkpointing_enable(self.keywords))
            if not internals.inputs_hooked(model):
                model.enable_input_require_grads()
        return model


def _done(name: str, subject: Subject) -> Outcome:
    preparation = subject.preparation
    with switches.cache_off(subject.model), switches.seeded(preparation.spec.seed, preparation.batch):
        return done(USES[name], subject)


def beside(name: str, mine: Outcome, base: Outcome, wide: Callable[[], Outcome]) -> Iterator[UseFacts]:
    """Each value beside the base's; what the base raises is the model's. The yardstick is the base's own rounding."""
    rounded: Outcome | None = None
    if "" in base:
        yield UseFacts(use=name, what="", expected=_text(base[""]), actual="", same=True)
        return
    if "" in mine:
        yield UseFacts(use=name, what="", expected="no error", actual=_text(mine[""]), same=False)
        return
    for what, expected in base.items():
        actual = mine.get(what, "absent")
        distance = None
        same = isinstance(expected, Raised) or _same(actual, expected)
        if not same and isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
            rounded = wide() if rounded is None else rounded
            distance = _distance(actual, expected, rounded.get(what))
        yield UseFacts(
            use=name, what=what, expected=_text(expected), actual=_text(actual), same=same, distance=distance
        )


def _same(actual: Value, expected: Value) -> bool:
    if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
        if actual.dtype.itemsize < expected.dtype.itemsize:
            return False
        return actual.shape == expected.shape and torch.equal(actual.nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5))
    return not isinstance(actual, torch.Tensor) and not isinstance(expected, torch.Tensor) and actual == expected


def _distance(actual: torch.Tensor, expected: torch.Tensor, rounded: Value | None) -> Distance | None:
    if actual.shape != expected.shape or actual.dtype.itemsize < expected.dtype.itemsize:
        return None
    comparable = isinstance(rounded, torch.Tensor) and rounded.shape == expected.shape
    yardstick = step.distance(expected, rounded) if comparable and isinstance(rounded, torch.Tensor) else 0.0
    return Distance(equal=False, relative=step.distance(actual, expected), yardstick=yardstick)


def _text(value: Value) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"norm {float(value.double().norm()):.6g}, shape {tuple(value.shape)}, {dtype}"
    return f"raises {value}" if isinstance(value, Raised) else value
