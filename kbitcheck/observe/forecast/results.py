"""Results of operators on fake tensors: a call with the arguments of an earlier one infers no shape anew.

Fake tensors have no numbers, so what an operator returns follows from the shapes, strides, offsets and dtypes of its tensors,
from its other arguments, and from the default dtype.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kbitcheck.observe import internals

Key = tuple[object, ...]
FRESH = -1
MOST = 1 << 15  # calls: about 50 MB


class _Undescribed(Exception):
    """An argument or result has what no description holds: numbers, a conjugate bit, another class."""


@dataclass(frozen=True, slots=True)
class _Result:
    """One result: the input number ``of`` itself where ``shape`` is None, else a view of it, or of a storage of its own."""

    of: int
    shape: Sequence[int] | None = None
    stride: Sequence[int] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32
    nbytes: int = 0  # of the storage


@dataclass(frozen=True, slots=True)
class _Returned:
    """What a call returns: results, None among them, and whether in a sequence."""

    results: Sequence[_Result | None]
    sequence: Callable[[Iterable[Any]], Any] | None


class Results:
    """Results of operators on the fake CPU tensors of ``mode``, by operator and arguments."""

    def __init__(self) -> None:
        self.mode = internals.FakeTensorMode(allow_non_fake_inputs=True)
        self.mode.cache_enabled = False  # torch's own, below this one
        with self.mode:
            self._example: Any = torch.empty(0)
        self._returned: dict[Key, _Returned | None] = {}

    def of(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], infer: Callable[[], Any]) -> Any:
        """What ``func(*args, **kwargs)`` returns; ``infer`` calls it, for a call that was not made before."""
        inputs: list[Tensor] = []
        try:
            key = (func, torch.get_default_dtype(), *self._key(args, inputs))
            if kwargs:
                key += (tuple(kwargs), *self._key(kwargs.values(), inputs))
            seen = key in self._returned
        except (_Undescribed, TypeError):  # or one that has no hash
            return infer()
        if not seen:
            return self._inferred(key, func, inputs, infer)
        returned = self._returned[key]
        return infer() if returned is None else self._made(returned, inputs)

    def _inferred(self, key: Key, func: Any, inputs: Sequence[Tensor], infer: Callable[[], Any]) -> Any:
        """The result of a new call, which is kept if it can be made again from its description."""
        if len(self._returned) >= MOST:
            self._returned.clear()
        before = self._states(inputs)
        out = infer()
        try:
            returned = self._description(out, inputs)
            again = self._description(self._made(returned, inputs), inputs)
            self._returned[key] = returned if returned == again and before == self._states(inputs) else None
        except _Undescribed:
            self._returned[key] = None
        return out

    def _key(self, values: Iterable[Any], inputs: list[Tensor]) -> list[object]:
        """The values as a key has them; appends their tensors to ``inputs``."""
        parts: list[object] = []
        for value in values:
            if isinstance(value, Tensor):
                self._check(value)
                inputs.append(value)
                parts.append((value.shape, value.stride(), value.storage_offset(), value.dtype, value.requires_grad))
            elif isinstance(value, (list, tuple)):
                parts.append(tuple(self._key(value, inputs)))
            else:
                parts.append((type(value), value))  # 1, 1.0 and True are equal
        return parts

    def _check(self, tensor: Any) -> None:
        if type(tensor) is not internals.FakeTensor or tensor.fake_mode is not self.mode:
            raise _Undescribed
        if (
            tensor.fake_device != self._example.fake_device
            or tensor.constant is not None
            or tensor.dtype.is_complex
            or tensor.is_neg()
        ):
            raise _Undescribed

    @staticmethod
    def _states(inputs: Iterable[Tensor]) -> list[object]:
        """What an operator could change of its tensors, beside numbers."""
        return [
            (t.shape, t.stride(), t.storage_offset(), internals.storage_id(t), t.untyped_storage().nbytes())
            for t in inputs
        ]

    def _description(self, out: Any, inputs: Sequence[Tensor]) -> _Returned:
        if not isinstance(out, (list, tuple)):
            return _Returned((self._result(out, inputs),), None)
        results = tuple(self._result(value, inputs) for value in out)
        own = [internals.storage_id(t) for t, r in zip(out, results, strict=True) if r and r.of == FRESH]
        if len(set(own)) < len(own):
            raise _Undescribed
        return _Returned(results, type(out))

    def _result(self, value: Any, inputs: Sequence[Tensor]) -> _Result | None:
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise _Undescribed
        for place, tensor in enumerate(inputs):
            if tensor is value:
                return _Result(place)
        self._check(value)
        storage = internals.storage_id(value)
        of = next((place for place, tensor in enumerate(inputs) if internals.storage_id(tensor) == storage), FRESH)
        if of != FRESH and len(inputs) > 1:  # which of several it is a view of may depend on what they share
            raise _Undescribed
        offset, nbytes = int(value.storage_offset()), value.untyped_storage().nbytes()
        return _Result(of, value.shape, value.stride(), offset, value.dtype, nbytes)

    def _made(self, returned: _Returned, inputs: Sequence[Tensor]) -> Any:
        made = [self._tensor(result, inputs) for result in returned.results]
        return made[0] if returned.sequence is None else returned.sequence(made)

    def _tensor(self, result: _Result | None, inputs: Sequence[Tensor]) -> Tensor | None:
        if result is None:
            return None
        if result.shape is None:
            return inputs[result.of]
        storage = None if result.of == FRESH else inputs[result.of].untyped_storage()
        return internals.fake_like(self._example, result.shape, result.stride, result.offset, result.dtype, storage)


@cache
def shared() -> Results:
    """The results that all models of the process share, as their steps make calls of the same shapes."""
    return Results()
