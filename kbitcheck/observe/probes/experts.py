"""The backward through stacks of experts that their module reads unpacked, measured from outside that module.

No layer stands for one expert, so that the module as a whole is compared with its float64 twin, on the tokens, choices and incoming
gradient of the step. Each token is judged for itself: an expert whose gradient is lost shows at those that were sent to it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from kbitcheck_reference.adapters import is_adapter_module
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from kbitcheck import backends
from kbitcheck.core.facts import YARDSTICKS, LayerBackward
from kbitcheck.models.internals import choose_implementation
from kbitcheck.observe.probes.tap import Tap

Read = Callable[[], torch.Tensor]
Reads = Callable[[str], Read]  # by the name of a parameter
HOME = ".parametrizations."  # torch's, between a module's name and a parameter's


class TwinStack(nn.Module):
    """In place of a parametrization: what another module reads is ``read()``, plain numbers without a gradient."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.read = read

    def forward(self) -> torch.Tensor:
        return self.read()


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that read a packed weight of their own unpacked, by name."""
    held = (name.partition(HOME)[0] for name, m in backends.holders(model) if not backends.recognition(m).multiplies(m))
    return {name: model.get_submodule(name) for name in held}


@dataclass(slots=True)
class _Call:
    """One forward of a module of experts with gradients on: its inputs, and what came back through it.

    ``entering`` is the gradient that entered its output, ``gradients`` those that left its inputs, by their place or name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[bool, torch.dtype]
    entering: torch.Tensor | None = None
    carried: bool = True
    gradients: dict[int | str, torch.Tensor] = field(default_factory=dict)


class ExpertsProbe:
    """Taps around one module of experts in one step. ``pristine`` is that module of a model that never runs.

    ``exact`` gives a stack's weight, by the name of its parameter, in float64, ``rounded`` in the dtype in which it is read.
    With ``leave`` an input that requires no grad is left so.
    """

    def __init__(self, module: nn.Module, pristine: nn.Module, exact: Reads, rounded: Reads, *, leave: bool) -> None:
        self._module, self._pristine, self._exact, self._rounded = module, pristine, exact, rounded
        self._leave = leave
        self._calls: list[_Call] = []

    def attach(self, hooks: ExitStack) -> None:
        """Put the hooks on the module, until ``hooks`` closes."""
        hooks.enter_context(self._module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True))
        hooks.enter_context(self._module.register_forward_hook(self._after))

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        device = next(t for t in args if isinstance(t, torch.Tensor)).device.type
        call = _Call((), {}, (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))
        tapped: dict[Any, Any] = {}
        for key, value in [*enumerate(args), *kwargs.items()]:
            tapped[key] = value
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                if key == 0 and not value.requires_grad and not self._leave:
                    value = value.detach().requires_grad_(True)
                if value.requires_grad:
                    tapped[key] = Tap.apply(value, partial(call.gradients.__setitem__, key))
        call.args = tuple(_plain(tapped[k]) for k in range(len(args)))
        call.kwargs = {k: _plain(tapped[k]) for k in kwargs}
        self._calls.append(call)
        return tuple(tapped[k] for k in range(len(args))), {k: tapped[k] for k in kwargs}

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if not torch.is_grad_enabled() or not self._calls:
            return output
        call = self._calls[-1]
        if not first.requires_grad:
            call.carried = not any(t.requires_grad for t in args if isinstance(t, torch.Tensor))
            return output
        tapped = Tap.apply(first, lambda gradient: setattr(call, "entering", gradient))
        return (tapped, *output[1:]) if isinstance(output, tuple) else tapped

    def result(self) -> LayerBackward | None:
        """Facts of the backward, the worst of its calls; None where the module did not run."""
        if not self._calls:
            return None
        # A recompute without reentrance is a call as well, and its graph is thrown away: the gradient passes the first one's.
        through = [call for call in self._calls if call.entering is not None]
        if not all(call.carried for call in self._calls) or not through:
            return LayerBackward(reached=False, carried=all(call.carried for call in self._calls))
        try:
            judged = [self._judge(call) for call in through]
        except RuntimeError as error:
            reason = f"its code does not run in float64: {type(error).__name__}: {error}".splitlines()[0]
            return LayerBackward(reached=True, carried=True, unjudged=reason)
        if any(excess is None for excess in judged):
            return LayerBackward(reached=True, carried=False)
        return LayerBackward(reached=True, carried=True, excess=max(excess for excess in judged if excess is not None))

    def _judge(self, call: _Call) -> float | None:
        """The largest error of a token's gradient over its bound; None where an input got none and should have."""
        exact, rounded = self._run(call, self._exact, torch.float64), self._run(call, self._rounded, None)
        if any(key not in call.gradients and bool(gradient.any()) for key, gradient in exact.items()):
            return None
        assert call.entering is not None
        ulp = torch.finfo(call.entering.dtype).eps
        return max(
            (_excess(call.gradients[k], exact[k], rounded[k], ulp) for k in exact if k in call.gradients), default=0.0
        )

    def _run(self, call: _Call, read: Reads, dtype: torch.dtype | None) -> Mapping[int | str, torch.Tensor]:
        """Gradients of the inputs through the module's own code, with weights that the format says."""
        module: Any = self._twin(read)
        if dtype is not None:
            module = module.to(dtype)
            if hasattr(module, "config"):  # the grouped product knows no float64
                choose_implementation(module.config, "eager")
        assert call.entering is not None
        device = call.entering.device.type
        leaves: dict[Any, Any] = {}
        for key, value in [*enumerate(call.args), *call.kwargs.items()]:
            leaves[key] = value
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                leaves[key] = value.to(dtype or value.dtype).detach().requires_grad_(key in call.gradients or key == 0)
        args = [leaves[k] for k in range(len(call.args))]
        on, half = call.autocast
        with torch.enable_grad(), torch.autocast(device, half, enabled=on and dtype is None):
            output = module(*args, **{k: leaves[k] for k in call.kwargs})
        first = output[0] if isinstance(output, tuple) else output
        wanted = [k for k, t in leaves.items() if isinstance(t, torch.Tensor) and t.requires_grad]
        inputs = [leaves[k] for k in wanted]
        gradients: Any = torch.autograd.grad(first, inputs, call.entering.to(first.dtype), allow_unused=True)
        return {k: torch.zeros_like(t) if g is None else g for k, t, g in zip(wanted, inputs, gradients, strict=True)}

    def _twin(self, read: Reads) -> nn.Module:
        """The module as it never ran, with the adapters that are on it now, and its parameters in their dtypes of now."""
        memo: dict[int, Any] = {}
        for name, stack in self._pristine.parametrizations.items():  # type: ignore[operator, union-attr]
            held: Any = self._module.parametrizations
            own = dict(held.items()).get(name)  # none where it was unpacked for good: KB207 tells
            twin: nn.Module = TwinStack(read(name))
            if own is not None and is_adapter_module(own):
                twin = copy.deepcopy(own, {id(own.base_layer): twin})
            memo[id(stack)] = twin
        made = copy.deepcopy(self._pristine, memo)
        for name, parameter in made.named_parameters(recurse=False):
            parameter.data = parameter.data.to(self._module.get_parameter(name).dtype)
        return made.train(self._module.training)


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _excess(actual: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor, ulp: float) -> float:
    """The largest error of a token's gradient, in four yardsticks: the error of the twin in the same dtypes on this token, or on
    the median one, or an ulp, of the token's gradient or of the typical one, whichever is largest.
    """
    exact = exact.reshape(-1, exact.shape[-1])
    if not exact.numel():
        return 0.0
    error = (actual.reshape(exact.shape).double() - exact).norm(dim=1)
    own = (rounded.reshape(exact.shape).double() - exact).norm(dim=1)
    size = exact.norm(dim=1).clamp(min=float(exact.norm() / len(exact) ** 0.5))
    bound = YARDSTICKS * torch.stack([own, (own / size).nan_to_num(0).median() * size, ulp * size]).amax(dim=0)
    return float(torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=float("inf")).max())


def probes(model: nn.Module, weights: Any, *, leave: bool) -> Iterator[tuple[str, ExpertsProbe]]:
    """A probe for each module of experts of a model; ``weights`` are those of the same model as it was loaded."""
    for name, module in model.named_modules():
        plain = name
        while plain not in weights.owners and "." in plain:
            plain = plain.partition(".")[2]
        if plain in weights.owners and is_parametrized(module):
            exact, rounded = partial(_exact, weights, plain), partial(_as_read, weights, plain, module)
            yield name, ExpertsProbe(module, weights.owners[plain], exact, rounded, leave=leave)


def _exact(weights: Any, owner: str, parameter: str) -> Read:
    read: Read = weights.stack(owner + HOME + parameter)
    return read


def _as_read(weights: Any, owner: str, module: Any, parameter: str) -> Read:
    """The weight in the dtype in which the module reads it now."""
    dtype = getattr(module, parameter).dtype

    def unpack(layer: nn.Module, empty: Any) -> torch.Tensor:
        return backends.arithmetic(layer).unpacked(layer, torch.float32).to(dtype)

    read: Read = weights.stack(owner + HOME + parameter, unpack)
    return read
