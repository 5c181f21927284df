"""How a predicted step runs: on what kind of device, under which autocast, in what loop."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name)
from torch import Tensor
from transformers import masking_utils

from kbitcheck.core.cases import Loss
from kbitcheck.observe import internals
from kbitcheck.observe.forecast.attention import AMPERE, HALF, CudaAttention, FlashAttention2
from kbitcheck.observe.forecast.cuda_autocast import Casts, Watcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What decides, beside the model, which kernels a step takes and what it holds.

    ``capability`` is a CUDA device's compute capability; ``autocast`` the dtype of autocast, None without. As in
    transformers' Trainer, the output is converted to float32 under autocast, and dropped before the backward, unless the
    training loop ``keeps_output``. ``packed`` sequences are one row without padding, ``loss`` says what holds the logits.
    """

    device: Literal["cpu", "cuda"] = "cuda"
    capability: tuple[int, int] = AMPERE
    autocast: torch.dtype | None = None
    keeps_output: bool = False
    packed: bool = False
    loss: Loss = "full"

    @contextmanager
    def kernels(self, watcher: Watcher) -> Iterator[None]:
        """Attention and autocast by the kernels of the device, for tensors that say they are on the CPU."""
        casts = Casts(watcher)
        with ExitStack() as stack:
            flash = {"flash_attention_2": FlashAttention2(casts, watcher)}
            stack.enter_context(mock.patch.dict(internals.attention_functions(), flash))
            # It looks for sequences packed into one, which needs the numbers of positions.
            if hasattr(masking_utils, "find_packed_sequence_indices"):
                packed = torch.zeros_like if self.packed else lambda position_ids: None
                stack.enter_context(mock.patch.object(masking_utils, "find_packed_sequence_indices", packed))
            if self.device == "cuda":
                attention = CudaAttention(self.capability, casts, watcher)
                stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
                if self.autocast is not None:
                    stack.enter_context(casts.installed())
            yield

    def autocasting(self) -> AbstractContextManager[Any]:
        """Autocast as it is on around a forward."""
        return nullcontext() if self.autocast is None else torch.autocast("cpu", dtype=self.autocast)

    def returned(self, output: Any) -> Any:
        """A model's output as the training loop gets it."""
        if self.autocast is None or self.keeps_output:
            return output
        return internals.tree_map_only(Tensor, lambda t: t.float() if t.dtype in HALF else t, dict(output))
