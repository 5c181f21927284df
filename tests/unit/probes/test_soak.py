"""Steps among evaluations: a base that does not evaluate says nothing about its preparation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kbitcheck_reference import prepare_model_for_kbit_training

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Loaded
from kbitcheck.sabotage.helpers import blocks, subclass
from tests.shallow import shallow

SPEC = CaseSpec(model="tiny:llama", quant="nf4", implementation="", checkpointing="reentrant")


def _no_evaluation(model: Any) -> None:
    subclass(blocks(model)[0], forward=_raising)


def _raising(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not self.training:
        raise RuntimeError("no evaluation")
    return super(type(self), self).forward(*args, **kwargs)


def _case(prepare: Callable[..., Any], spoil: Callable[[Any], None] | None) -> Case:
    return Case(SPEC, prepare, Loaded.from_source(shallow("tiny:llama"), SPEC, spoil=spoil))


def test_a_base_that_does_not_evaluate_is_looked_at_without_evaluations() -> None:
    later = _case(prepare_model_for_kbit_training, _no_evaluation).later
    assert {distance.equal for look in later.looks.values() for distance in look.values()} == {True}


def _sets_a_weight(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not self.training:
        self.mlp.down_proj.weight = self.mlp.down_proj.weight
    return super(type(self), self).forward(*args, **kwargs)


def test_a_base_whose_own_code_sets_a_weight_does_not_evaluate_with_adapters() -> None:
    """As RWKV's, which rescales weights where it evaluates: no module with an adapter lets it."""
    case = _case(prepare_model_for_kbit_training, lambda model: subclass(blocks(model)[0], forward=_sets_a_weight))
    assert {distance.equal for look in case.later.looks.values() for distance in look.values()} == {True}
    assert case.left_by_evaluation == 0


def test_what_an_evaluation_leaves_is_unknown_of_such_a_base() -> None:
    with pytest.raises(Unavailable, match="the unprepared base does not evaluate, either: RuntimeError: no evaluation"):
        _ = _case(prepare_model_for_kbit_training, _no_evaluation).left_by_evaluation


def test_a_prepared_model_alone_that_does_not_evaluate_raises() -> None:
    def prepare(model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None) -> Any:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        _no_evaluation(model)
        return model

    with pytest.raises(RuntimeError, match="no evaluation"):
        _ = _case(prepare, None).later
