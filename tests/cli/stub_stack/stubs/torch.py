"""As much of torch as the environment facts ask for."""

from contextlib import nullcontext
from types import SimpleNamespace

__version__ = "0.stub"
cuda = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
cpu = SimpleNamespace()
compiler = SimpleNamespace(set_stance=lambda stance: nullcontext())
version = SimpleNamespace(cuda=None)
backends = SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: "STUB"))


def set_num_threads(number: int) -> None:
    pass


def get_num_threads() -> int:
    return 1
