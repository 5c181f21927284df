"""Results of operators that are made from an earlier call's: as inferred, and only where nothing else decides them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kbitcheck.observe import internals
from kbitcheck.observe.forecast.fake_tensors import Counted, World
from kbitcheck.observe.forecast.results import Results

ONE = {
    "softmax": lambda t: F.softmax(t, -1),
    "a view of a view": lambda t: t.transpose(0, 1)[1:],
    "a broadcast": lambda t: t.sum(0) * t,
    "three results": lambda t: torch.native_layer_norm(t, t.shape[-1:], None, None, 1e-5)[2],
    "the second result": lambda t: torch.topk(t, 2).indices,
    "in place": lambda t: t.add_(1),
    "views in a list": lambda t: t.split(2)[1],
    "other dtypes": lambda t: t.to(torch.bfloat16).float(),
    "no input's values": lambda t: t.new_zeros(3),
    "twice one tensor": lambda t: t @ t.t(),
}
TWO = {
    "float and int": (lambda t: t * 1, lambda t: t * 1.0),
    "bool and int": (lambda t: t.bool() * 1, lambda t: t.bool() * True),
    "ends": (lambda t: t[:2], lambda t: t[:3]),
    "keyword": (lambda t: t.sum(0, keepdim=True), lambda t: t.sum(0)),
    "dtype": (lambda t: t.to(torch.float16), lambda t: t.to(torch.float64)),
    "default dtype": (lambda t: t / 2, lambda t: with_default(torch.float64, lambda: t / 2)),
    "strides": (lambda t: t.as_strided((4, 4), (4, 1)).clone(), lambda t: t.as_strided((4, 4), (1, 4)).clone()),
}


def with_default(dtype, function):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return function()
    finally:
        torch.set_default_dtype(before)


def described(tensor):
    storage = tensor.untyped_storage()
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, storage.nbytes()


def integers(world):
    with world.mode:
        return torch.empty(4, 6, dtype=torch.int32)


def floats(world):
    with world.mode:
        return torch.empty(4, 6)


class Recording(Counted):
    """Records the operators whose results are inferred."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.inferred: list[Any] = []
        super().__init__(*args, **options)

    def _infer(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.inferred.append(func)
        return super()._infer(func, args, kwargs)


def run(world, function, tensor):
    """What ``function`` returns, the operators whose results were inferred for it, and the bytes that are then alive."""
    live = Recording([tensor], results=world.results)
    with world.mode, live:
        out = function(tensor)
    return out, live.inferred, live.now


@pytest.mark.parametrize("function", ONE.values(), ids=ONE)
def test_an_equal_call_is_inferred_once(function):
    world = World(Results())
    first, second = floats(world), floats(world)
    inferred = run(world, function, first)
    made = run(world, function, second)
    assert inferred[1]
    assert made[1] == []
    assert made[2] == inferred[2]
    assert described(made[0]) == described(inferred[0])
    assert (made[0] is second) == (inferred[0] is first)
    shares = [internals.storage_id(a) == internals.storage_id(b) for a, b in ((inferred[0], first), (made[0], second))]
    assert shares[0] == shares[1]


@pytest.mark.parametrize(("one", "other"), TWO.values(), ids=TWO)
def test_calls_that_differ_are_not_taken_for_each_other(one, other):
    plain = [described(function(torch.empty(4, 6, dtype=torch.int32))) for function in (one, other)]
    assert plain[0] != plain[1]
    world = World(Results())
    tensor = integers(world)
    assert [described(run(world, function, tensor)[0]) for function in (one, other, one, other)] == [*plain, *plain]


def test_a_tensor_with_numbers_is_computed():
    world = World(Results())
    for number in (3, 4):
        with world.mode, Counted(results=world.results):
            double: Any = torch.tensor(number) * 2
        assert double.constant.item() == 2 * number


def test_a_change_of_shape_in_place_is_made_each_time():
    world = World(Results())
    for _ in range(2):
        tensor = floats(world)
        assert run(world, lambda t: t.t_(), tensor)[0] is tensor
        assert tensor.shape == (6, 4)
