"""The private parts of torch that forecasts alone use. It is there in torch 2.11 to 2.13."""

from contextlib import AbstractContextManager
from typing import Any

import torch


def without_modes() -> AbstractContextManager[Any]:
    """Operators called inside compute, whatever mode of torch's is entered."""
    guard: AbstractContextManager[Any] = torch._C._DisableTorchDispatch()
    return guard
