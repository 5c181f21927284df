"""What the two oracles see of a case: the twin of the whole model, and the twins of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from unittest import mock

from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.facts.case import OpenCase
from kbitcheck.core.result import Observation, Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.judge.blockwise import gradients_off, tensors_off
from kbitcheck.observe.loaded import Loaded


def off_whole_model(case: OpenCase) -> list[str]:
    """Places where the twin of the whole model, by itself, sees a fault."""
    return _off(lambda: [*gradients_off(case.gradients), *gradients_off(case.single_gradients)])


def off_by_blocks(case: OpenCase) -> list[str]:
    """Places where the twins of the blocks, by themselves, see a fault."""
    return _off(lambda: [*tensors_off(case.blockwise), *tensors_off(case.single_blockwise)])


def off_as_of_a_large_one(case: OpenCase) -> list[str]:
    """Places where KB304 sees a fault without a twin of the whole model; closes the case, which is a new one."""
    with suppress(NotApplicable, Unavailable):
        _ = case.run  # the forwards before it are those of a small model, which shares its base's
    with mock.patch.object(Loaded, "large", new=True):
        result = judge(rules()["KB304"], case)
        case.close()
    return [failure.where for failure in result.failures] if result.status is Status.FAIL else []


def _off(observations: Callable[[], Iterable[Observation]]) -> list[str]:
    try:
        return [observation.where for observation in observations() if not observation.ok]
    except (NotApplicable, Unavailable):
        return []
    except ValueError as error:  # adapters find no layer where the fault took it away: no gradient is compared
        if "has no linear layer named" not in str(error):
            raise
        return []
