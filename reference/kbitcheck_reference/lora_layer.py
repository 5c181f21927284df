"""One linear layer with LoRA (arXiv 2106.09685) beside it."""

from itertools import chain
from typing import Any

import torch
from torch import nn

_BASE = "base_layer."
_DOWN, _UP = "lora_A", "lora_B"


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank pair beside it: ``base_layer(x) + scaling * B(A(dropout(x)))``.

    ``state_dict`` names the base layer's entries as if it were not wrapped, and ``load_state_dict`` reads them so.

    Args:
        base_layer: the layer to wrap, of any quantization; it is neither changed nor frozen here.
        rank: inner size of the pair.
        alpha: ``scaling`` is ``alpha / rank``.
        dropout: probability, on the adapter's input alone.
        dtype: dtype of the pair.
        seed: of the draw of ``lora_A``; ``lora_B`` is zero.
    """

    is_adapter_layer = True

    def __init__(
        self, base_layer: nn.Module, *, rank: int, alpha: float, dropout: float, dtype: torch.dtype, seed: int
    ) -> None:
        super().__init__()
        size_in, size_out = _sizes(base_layer)
        device = next(chain(base_layer.parameters(), base_layer.buffers())).device
        self.base_layer = base_layer
        self.in_features, self.out_features = size_in, size_out  # some models ask a layer how wide it is
        self.dropout = nn.Dropout(dropout)
        bound = size_in**-0.5  # Kaiming uniform with a = sqrt(5), as nn.Linear draws its weight
        down = torch.empty(rank, size_in).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        self.lora_A = _linear(down.to(device, dtype))
        self.lora_B = _linear(torch.zeros(size_out, rank, dtype=dtype, device=device))
        self.scaling = alpha / rank
        self.train(base_layer.training)
        self.register_state_dict_post_hook(_hide_base_prefix)  # torch's
        self.register_load_state_dict_pre_hook(_restore_base_prefix)  # torch's

    @property
    def weight(self) -> nn.Parameter:
        """The base layer's weight; some models look at its dtype."""
        weight: nn.Parameter = self.base_layer.weight  # type: ignore[assignment]  # a linear layer has one
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute base and adapter; ``x`` is ``(..., in)`` of any float dtype, the result is of the base output's."""
        result: torch.Tensor = self.base_layer(x)
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        total: torch.Tensor = result + (update * self.scaling).to(result.dtype)
        return total


class LoraStack(nn.Module):
    """A frozen stack of experts' weights that another module reads, with a low-rank pair for each: ``W + scaling * B @ A``.

    It stands where ``base_layer`` stood, in a module's ``parametrizations``: reading the parameter calls it. The factors are
    ``(experts, rank, columns)`` and ``(experts, rows, rank)``; arguments are those of ``LoraLinear``.
    """

    is_adapter_layer = True

    def __init__(
        self, base_layer: nn.Module, *, rank: int, alpha: float, dropout: float, dtype: torch.dtype, seed: int
    ) -> None:
        super().__init__()
        if dropout:
            raise ValueError("adapters on stacked experts have no input of their own to drop from")
        like: torch.Tensor = base_layer()
        experts, rows, columns = like.shape
        self.base_layer = base_layer
        bound = columns**-0.5
        draw = torch.Generator().manual_seed(seed)
        down = torch.empty(experts, rank, columns).uniform_(-bound, bound, generator=draw)
        self.lora_A = _Factor(down.to(like.device, dtype))
        self.lora_B = _Factor(torch.zeros(experts, rows, rank, dtype=dtype, device=like.device))
        self.scaling = alpha / rank
        self.train(base_layer.training)

    def forward(self) -> torch.Tensor:
        """The weights with their updates, in the dtype in which they are read."""
        weights: torch.Tensor = self.base_layer()
        with torch.autocast(weights.device.type, enabled=False):
            update = (self.lora_B.weight @ self.lora_A.weight) * self.scaling
        return weights + update.to(weights.dtype)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, which stores its weight as ``(in, out)``."""
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def _linear(weight: torch.Tensor) -> nn.Linear:
    # Built on the meta device because nn.Linear draws its weight from the global generator otherwise.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


class _Factor(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def _sizes(layer: Any) -> tuple[int, int]:
    """(in features, out features)."""
    return tuple(layer.weight.shape) if is_conv1d(layer) else (layer.in_features, layer.out_features)


def _hide_base_prefix(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for key in [key for key in state if key.startswith(prefix + _BASE)]:
        state[prefix + key.removeprefix(prefix + _BASE)] = state.pop(key)


def _restore_base_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    adapters = (f"{prefix}{_DOWN}.", f"{prefix}{_UP}.", prefix + _BASE)
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(adapters)]:
        state[prefix + _BASE + key.removeprefix(prefix)] = state.pop(key)
