"""Tensors without numbers: a model on the meta device runs as on a CPU or a GPU, and nothing is computed.

Fake tensors carry a device, so that quantizers, autocast and attention pick the kernels of that device, which decide
what is saved for the backward.
"""

import os
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from kbitcheck import backends
from kbitcheck.backends import registry
from kbitcheck.observe import internals
from kbitcheck.observe.forecast.attention import workspace
from kbitcheck.observe.forecast.cuda_autocast import Watcher
from kbitcheck.observe.forecast.integers import by_numbers, has_numbers, with_numbers
from kbitcheck.observe.forecast.results import Results, shared
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.forecast.storages import Log
from kbitcheck.observe.probes.live import Live

NEW = torch.ops.aten.new_empty.default


class World:
    """Where fake tensors live: the mode, and the fake twin of each real or meta tensor.

    They are on the CPU whatever the runtime is: torch's autograd engine needs a driver for a CUDA tensor, even for a fake
    one.
    """

    def __init__(self, results: Results | None = None) -> None:
        self.results = results or shared()
        self.mode = self.results.mode
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}  # the originals are kept: an identity is one while they live

    def tensor(self, real: Tensor) -> Tensor:
        """The fake twin of a tensor, always the same."""
        if id(real) not in self._twins:
            with self.mode:
                twin = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="cpu")
            self._twins[id(real)] = (real, twin)
        return self._twins[id(real)][1]

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Every twin."""
        return (twin for _, twin in self._twins.values())

    def move(self, model: nn.Module) -> None:
        """Put a fake twin in the place of every parameter, buffer and state of the model. Ties survive."""
        fakes: dict[int, nn.Parameter] = {}
        holders = [(module, dict(internals.own_parameters(module)), backends.of(module)) for module in model.modules()]
        for module in model.modules():
            parameters, buffers = internals.own_parameters(module), internals.own_buffers(module)
            for name, parameter in parameters.items():
                if parameter is not None:
                    parameters[name] = fakes.setdefault(id(parameter), self._parameter(parameter))
            for name, buffer in buffers.items():
                if buffer is not None:
                    buffers[name] = self.tensor(buffer)
        for module, real, backend in holders:
            if backend is not None:
                backend.kernels.fake(module, real, self.tensor)

    def _parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        with self.mode:
            twin = nn.Parameter(self.tensor(parameter), requires_grad=parameter.requires_grad)
        self._twins[id(twin)] = (twin, twin)
        return twin

    @contextmanager
    def entered(self, runtime: Runtime, watcher: Watcher | None = None) -> Iterator[None]:
        """Inside, operators take and make fake tensors, and kernels are those of the runtime."""
        with ExitStack() as stack:
            # transformers checks numbers that are not there; the switch is its own.
            stack.enter_context(mock.patch.dict(os.environ, {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}))
            stack.enter_context(internals.without_grouped_kernel())
            stack.enter_context(internals.quiet_fake_tensors())
            stack.enter_context(runtime.kernels(watcher or Watcher()))
            for backend in registry.available():
                stack.enter_context(backend.kernels.on_device(runtime.device))
            stack.enter_context(self.mode)
            yield


class Counted(Live):
    """Counts storages, and answers for numbers that are not there as if tokens were spread evenly over experts.

    Reading one number gives zero (or False). With ``numbers``, integers have theirs: a model that reads images computes lengths
    and positions from them. ``experts`` are the numbers of them that layers have. ``trace`` is the bytes alive after each
    operator that makes a storage.
    """

    def __init__(
        self,
        existing: Iterable[Tensor] = (),
        device: str = "cpu",
        results: Results | None = None,
        *,
        numbers: bool = False,
        experts: Container[int] = (),
    ) -> None:
        self._results = results
        self._numbers, self._experts = numbers, experts
        self.log = Log()
        super().__init__(existing)
        self.log = Log()  # what exists is not of the step
        self._device = device
        self._backends = registry.available()
        self._readers, self._taken = 1, 0
        self.trace: list[int] = []

    def made(self, key: int, size: int) -> None:
        if size:
            self.log.make(key, size)

    def freed(self, key: int) -> None:
        self.log.free(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return args[0].fake_device
        if func is internals.READ_NUMBER and not (self._numbers and has_numbers(args[0])):
            return 0.0 if args[0].dtype.is_floating_point else 0
        kwargs = kwargs or {}
        if func is torch.ops.aten.nonzero.default and not (self._numbers and has_numbers(args[0])):
            func, args, kwargs = NEW, (args[0], (self._rows(args[0]), args[0].dim())), {"dtype": torch.int64}
        if self._numbers and func is torch.ops.aten.index.Tensor:
            args = (args[0], [number for index in args[1] for number in by_numbers(index)])
        before = self.now
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.now > before:
            self.trace.append(self.now)
        if self._device == "cuda":
            # The backward of softmax multiplies its arguments first (torch: aten/src/ATen/native/cuda/SoftMax.cu).
            freed = out.nbytes if func is internals.SOFTMAX_BACKWARD else workspace(func, args)
            if freed:
                self.trace.append(self.now + freed)
                self.log.scratch(freed)
        return out

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator returns, as its backend computes it."""
        infer = partial(self._infer, func, args, kwargs)
        if self._results is not None:
            infer = partial(self._results.of, func, args, kwargs, infer)
        return with_numbers(func, args, kwargs, infer) if self._numbers else infer()

    def _infer(self, func: Any, args: Any, kwargs: Any) -> Any:
        for backend in self._backends:
            func, args, kwargs = backend.kernels.operator(func, args, kwargs)
        return func(*args, **kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's hook: nothing is compiled here, and the guard against it is slow

    def _rows(self, mask: Tensor) -> int:
        """How many are set: all that could be of a list of experts, then an even share of the tokens for each."""
        if mask.dim() == 1:
            readers = mask.numel()
            if readers not in self._experts and readers - 1 in self._experts:
                readers -= 1  # the last place stands for experts on other devices
            self._readers, self._taken = max(readers, 1), 0
            return readers
        before = mask.numel() * self._taken // self._readers
        self._taken += 1
        return mask.numel() * self._taken // self._readers - before
