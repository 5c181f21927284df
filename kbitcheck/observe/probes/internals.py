"""Private names of torch that the probes of the process need: this file alone of their folder uses them.

Each is there in torch 2.11 to 2.13; ``tests/unit/test_internals.py`` fails by name where one has moved.
"""

from typing import Any

import torch
import torch.utils.checkpoint


def modes() -> tuple[int, int, Any]:
    """Modes of torch that are entered, and the innermost hooks on tensors that are saved for a backward."""
    saved = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(), saved


def checkpoint_defaults() -> tuple[Any, ...]:
    """Settings of torch's checkpoint for the whole process."""
    checkpoint = torch.utils.checkpoint
    return checkpoint._enable_checkpoint_early_stop, checkpoint._checkpoint_debug_enabled


def parts_of_sparse(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The plain tensors of one that is sparse and has no storage: indices and values, whether or not they are coalesced."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    rows, columns = ("crow_indices", "col_indices") if by_row else ("row_indices", "ccol_indices")
    return getattr(tensor, rows)(), getattr(tensor, columns)(), tensor.values()
