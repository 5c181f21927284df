import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases():
    """Bases by model and quantization, shared by the tests of a process."""
    return {}
