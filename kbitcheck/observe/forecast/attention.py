"""Which kernel ``scaled_dot_product_attention`` takes on a CUDA device, and what the kernel allocates."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name)
from torch import Tensor

from kbitcheck.observe import internals
from kbitcheck.observe.forecast.cuda_autocast import Casts, Watcher, half

HALF = (torch.float16, torch.bfloat16)
LARGEST_FLASH_HEAD = 256
AMPERE = (8, 0)
FLASH, EFFICIENT, MATH = "flash", "memory-efficient", "math"


class CudaAttention:
    """Stands for ``torch.nn.functional.scaled_dot_product_attention`` on a device of a compute capability.

    Kernels are chosen as in torch's ``sdp_utils.cpp``, up to torch 2.13.
    """

    def __init__(self, capability: tuple[int, int], casts: Casts, watcher: Watcher) -> None:
        self._capability, self._casts, self._watcher = capability, casts, watcher

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention without numbers."""
        dtype = half()
        if dtype is not None:
            query, key, value, attn_mask = (self._casts.cast(t, dtype) for t in (query, key, value, attn_mask))
        grouped = enable_gqa and query.shape[-3] != key.shape[-3]
        why = self._no_flash(query, key, value, attn_mask, dropout_p, is_causal)
        with internals.below_autocast():
            if not why:
                self._watcher.attends(FLASH)
                return _flash(query, key, value, dropout_p, is_causal, scale)
            why_math = "grouped queries" if grouped else self._no_efficient(query, key, value)
            if not why_math:
                self._watcher.attends(f"{EFFICIENT} ({why})")
                return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
            self._watcher.attends(f"{MATH} ({why} and {why_math})")
            settings = {"scale": scale, "enable_gqa": enable_gqa}
            result: tuple[Tensor, ...] = internals.MATH_ATTENTION(
                query, key, value, attn_mask, dropout_p, is_causal, None, **settings
            )
            return result[0]

    def _no_flash(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool
    ) -> str:
        """Why flash attention is not taken; empty where it is."""
        head = query.shape[-1]
        if self._capability < AMPERE:
            return "a GPU older than Ampere"
        if query.dim() != 4 or {query.dtype, key.dtype, value.dtype} not in ({dtype} for dtype in HALF):
            return _name(query.dtype)
        if mask is not None:
            return "a mask"
        if head > LARGEST_FLASH_HEAD or not head == key.shape[-1] == value.shape[-1]:
            return f"heads of {head}"
        if causal and query.shape[-2] != key.shape[-2]:
            return "causal with other keys than queries"
        # The backward needs more shared memory than the consumer GPUs of these generations have.
        small = (8, 6) <= self._capability <= (8, 9) or self._capability >= (12, 0)
        if small and (192 < head <= 224 or (head > 224 and dropout > 0)):
            return f"heads of {head}"
        return ""

    def _no_efficient(self, query: Tensor, key: Tensor, value: Tensor) -> str:
        """Why the memory-efficient kernel is not taken; empty where it is."""
        if query.dim() != 4 or query.dtype not in (torch.float32, *HALF):
            return _name(query.dtype)
        if query.dtype == torch.bfloat16 and self._capability < AMPERE:
            return "bfloat16"
        heads = query.shape[-1], value.shape[-1]
        multiple = 8 if query.dtype in HALF and self._capability >= (7, 0) else 4 if self._capability >= AMPERE else 1
        if query.shape[-1] != key.shape[-1] or any(head % multiple for head in heads):
            return f"heads of {heads[0]}"
        if not query.shape[-3] == key.shape[-3] == value.shape[-3]:
            return "grouped queries"
        return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, scale: float | None) -> Tensor:
    head = query.shape[-1]
    if head % 8:
        query, key, value = (F.pad(t, (0, -head % 8)) for t in (query, key, value))
    result: Tensor = internals.FLASH_ATTENTION(query, key, value, dropout, causal, scale=scale)[0]
    return result[..., :head]


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Tensor:
    bias = mask
    if bias is not None and bias.dtype is torch.bool:
        bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), float("-inf"))
    if bias is not None:
        if any(stride % 8 for stride in bias.stride()[:-1]):  # rows must begin at multiples of 16 bytes
            bias = F.pad(bias, (0, 8 - bias.shape[-1] % 8))[..., : bias.shape[-1]]
        bias = bias.expand(*query.shape[:3], key.shape[2])
    result: Tensor = internals.EFFICIENT_ATTENTION(query, key, value, bias, True, dropout, causal, scale=scale)[0]
    return result


def workspace(operator: Any, args: Sequence[Any]) -> int:
    """Bytes that an attention's backward allocates beside its results, and frees (torch: ``flash_api.cpp``)."""
    if operator not in (internals.FLASH_BACKWARD, internals.EFFICIENT_BACKWARD):
        return 0
    query: Tensor = args[1]
    key: Tensor = args[2]
    batch, heads, length, head = query.shape
    sums = 4 * batch * heads * _up(length, 128)  # float32
    if query.dtype not in HALF:
        return sums
    accumulated = sums * _up(head, 32 if head <= 128 else 64)  # the gradient of the queries, in float32
    expanded = 2 * key.element_size() * batch * key.shape[2] * heads * head if key.shape[1] != heads else 0
    return sums + accumulated + expanded


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class FlashAttention2:
    """Stands for transformers' ``flash_attention_2`` without its package: it saves queries, keys, values, results and sums.

    Windows need no mask, and a padded batch is gathered into one row and scattered back.
    """

    def __init__(self, casts: Casts, watcher: Watcher) -> None:
        self._casts, self._watcher = casts, watcher

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Queries, keys and values (batch, heads, tokens, head); results (batch, tokens, heads, head)."""
        self._watcher.attends("flash_attention_2")
        dtype = half() or (query.dtype if query.dtype in HALF else _half_of(module))
        query, key, value = (self._casts.cast(t, dtype) for t in (query, key, value))
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        with internals.below_autocast():
            if attention_mask is not None:
                query, key, value = (t.clone() for t in (query, key, value))
            result = _flash(query, key, value, dropout, causal and query.shape[2] == key.shape[2], None)
            return (result if attention_mask is None else result.clone()).transpose(1, 2), None


def _half_of(module: Any) -> torch.dtype:
    stated = getattr(module.config, "dtype", None)
    return stated if stated in HALF else torch.bfloat16
