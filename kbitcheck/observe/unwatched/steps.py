"""Prepares quantized models and trains them, and says what came of each as digests: ``python steps.py JOB``.

This file is also run alone, copied, in a process that imports nothing else of its package.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

Digests = dict[str, str]
STEPS, RANK, RATE = 3, 2, 0.05


def digest(tensor: torch.Tensor) -> str:
    """A hash of a tensor's bits."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{str(tensor.dtype).removeprefix('torch.')} {hashlib.blake2b(data, digest_size=8).hexdigest()}"


def state(model: nn.Module) -> Digests:
    """What a model holds: parameters, buffers, flags and hooks."""
    held = {n: f"{digest(p)}{', trains' if p.requires_grad else ''}" for n, p in model.named_parameters()}
    held |= {n: digest(b) for n, b in model.named_buffers()}
    hooked = {n: sum(len(t) for k, t in vars(m).items() if k.endswith("hooks") and t) for n, m in model.named_modules()}
    held |= {f"hooks of {n or 'the model'}": str(count) for n, count in hooked.items() if count}
    on = [n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False) is True]
    return {**held, "checkpointing": ", ".join(on), "class": type(model).__name__}


class Adapted:
    """A model whose targets add a low-rank product, and what its steps give."""

    def __init__(self, model: Any, targets: Sequence[str], batch: Mapping[str, torch.Tensor]) -> None:
        self.model, self.batch = model, batch
        generator = torch.Generator().manual_seed(0)
        self.pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name in targets:
            layer: Any = model.get_submodule(name)
            if not hasattr(layer, "in_features"):  # a stack of experts, which is called without an input
                continue
            down, up = (
                (0.1 * torch.randn(shape, generator=generator)).requires_grad_(True)
                for shape in ((RANK, layer.in_features), (layer.out_features, RANK))
            )
            self.pairs[name] = down, up
            layer.register_forward_hook(self._hook(down, up))

    def _hook(self, down: torch.Tensor, up: torch.Tensor) -> Callable[..., torch.Tensor]:
        def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            added: torch.Tensor = args[0].to(down.dtype) @ down.T @ up.T
            return output + added.to(output.dtype)

        return add

    def steps(self) -> Digests:
        """Losses, gradients, and logits in evaluation between and after the steps."""
        seen: Digests = {}
        for number in range(1, STEPS + 1):
            torch.manual_seed(number)
            self.model.train()
            loss = self.model(**self.batch).loss
            loss.backward()
            seen[f"loss of step {number}"] = digest(loss)
            for name, pair in self.pairs.items():
                for side, tensor in zip(("down", "up"), pair, strict=True):
                    gradient = tensor.grad
                    seen[f"gradient of {name}.{side} in step {number}"] = (
                        "none" if gradient is None else digest(gradient)
                    )
                    if gradient is not None:
                        tensor.data.sub_(gradient, alpha=RATE)
                    tensor.grad = None
            self.model.eval()
            with torch.no_grad():
                seen[f"logits after step {number}"] = digest(self.model(**self.batch).logits)
            seen[f"random numbers after step {number}"] = digest(torch.rand(4))
        return seen


def prepared(prepare: Callable[..., Any], base: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[Any, Digests]:
    """The model that a preparation gives, after steps, and its digests."""
    torch.manual_seed(0)
    answer = prepare(base["model"], **arguments)
    model = answer if isinstance(answer, nn.Module) else base["model"]
    held = {f"prepared: {n}": text for n, text in state(model).items()}
    return model, {**held, **Adapted(model, base["targets"], base["batch"]).steps()}


def in_order(
    prepare: Callable[..., Any], bases: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> list[Digests]:
    """The digests of bases prepared one after the other, and last those of the first, before and after the others."""
    first, digests = prepared(prepare, bases[0], arguments)
    before = state(first)
    others = [prepared(prepare, base, arguments)[1] for base in bases[1:]]
    after = state(first)
    return [digests, *others, {n: before.get(n, "absent") for n in {**before, **after}}, after]


def names() -> list[str]:
    """Everything in this process by which somebody could tell who runs it."""
    seen = [*sys.modules, *sys.argv, *(f"{n}={v}" for n, v in os.environ.items())]
    seen += [thread.name for thread in threading.enumerate()]
    frame: Any = inspect.currentframe()
    while frame is not None:
        seen.append(f"{frame.f_code.co_filename} {frame.f_globals.get('__name__')}")
        frame = frame.f_back
    files = Path("/proc/self/fd")
    seen += [str(f.readlink()) for f in files.iterdir() if f.is_symlink() and f.exists()] if files.exists() else []
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    return [*seen, parent.read_bytes().decode(errors="replace") if parent.exists() else ""]


def imported(module: str, file: str, attribute: str) -> Callable[..., Any]:
    """A function by its module's name, or by its file where no such module is on the path."""
    item: Any
    try:
        item = importlib.import_module(module)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None
        assert spec.loader is not None
        item = sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(item)
    for name in attribute.split("."):
        item = getattr(item, name)
    return item  # type: ignore[no-any-return]


def main(job: str) -> None:
    """Run each order in a fork, which imports the preparation anew, and write what came of it beside the job."""
    task = json.loads(Path(job).read_text(encoding="utf-8"))
    sys.path[:] = task["path"]
    torch.set_num_threads(1)
    bases = [pickle.loads(Path(file).read_bytes()) for file in task["bases"]]  # noqa: S301
    for number, order in enumerate(task["orders"]):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        answer: dict[str, Any] = {"names": names()}
        try:
            prepare = imported(task["module"], task["file"], task["attribute"])
            answer["digests"] = in_order(prepare, [bases[i] for i in order], task["arguments"])
            answer["names"] = names()
        except BaseException as error:
            answer["raised"] = f"{type(error).__name__}: {error}"
        Path(f"{job}.{number}").write_text(json.dumps(answer), encoding="utf-8")
        return


if __name__ == "__main__":
    main(sys.argv[1])
