"""Training steps of one process, and what is recorded of them."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.core.errors import Unavailable
from kbitcheck.models.blocks import is_block
from kbitcheck.models.inputs.text import one_row, row_count
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.probes.adapters import Attached
from kbitcheck.observe.unwatched.steps import digest

RANKS = ("rank 0", "rank 1")
STEPS, RATE = 2, 1e-3
Gradients = dict[str, torch.Tensor | None]
Record = dict[str, Any]


class Run:
    """One process's part of a composition. What a script does at each point is a method, which a fault may replace."""

    processes: tuple[str, ...] = ("one process",)
    in_turn = False  # whether its processes run one after the other
    expects = "row"  # the gradients that are expected: of the first row, of the whole batch, or their mean over the ranks' rows
    counts_runs = True

    def __init__(self, preparation: Preparation, rank: int, folder: str, expects: str = "") -> None:
        self.preparation, self.rank, self.folder = preparation, rank, folder
        self.expects = expects or self.expects
        self.seed = preparation.spec.seed
        self.record: Record = {}

    def go(self) -> None:
        """Do this process's part, and record it."""
        self.trained(self.attached())

    def attached(self) -> Attached:
        """A fresh model, prepared and with adapters, without dropout, so that steps compare."""
        attached = self.preparation.attach(self.preparation.prepared_copy())
        switches.set_dropout(attached.model, 0.0)
        return attached

    def row(self, number: int) -> step.Batch:
        """One row of the batch, counted from zero."""
        batch = self.preparation.batch
        if row_count(batch) < 2:
            raise Unavailable("the batch has one row, and two processes train on one each")
        return one_row(batch, number)

    def data(self) -> step.Batch:
        """What this process trains on."""
        return self.row(self.rank)

    def wrap(self, model: nn.Module, adapters: Mapping[str, nn.Parameter]) -> nn.Module:
        """The model as the composition wants it."""
        return model

    def backward(self, model: nn.Module, batch: step.Batch) -> None:
        """One forward and backward in train mode."""
        model.train()
        with switches.seeded(self.seed, batch):
            with self.preparation.autocast():
                loss = model(**step.feed(model, batch)).loss
            loss.backward()

    def trained(self, attached: Attached) -> None:
        """Wrap a model and take the steps of this process, with everything that is recorded of them."""
        model, adapters = attached
        before = of_base(model, adapters)
        wrapped = self.wrap(model, adapters)
        named = by_name(model, adapters)
        self.record["frozen"] = [n for n, p in named().items() if not p.requires_grad]
        self.record["numbers"] = {"before step 1": numbers(named())}
        taken = 0

        def gradients() -> None:
            nonlocal taken
            self.backward(wrapped, self.data())
            taken += 1

        with recorded(model, self.record, lambda: taken) if self.counts_runs else nullcontext():
            take_steps(model, named, gradients, self.record)
        self.record["changed"] = differing(before, of_base(model, adapters))


def take_steps(
    model: nn.Module,
    adapters: Callable[[], Mapping[str, nn.Parameter]],
    gradients: Callable[[], None],
    record: Record,
) -> None:
    """Steps of an optimizer; ``gradients`` runs forward and backward. Their gradients and numbers are recorded."""
    trainable = [p for p in adapters().values() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0) if trainable else None
    for number in range(1, STEPS + 1):
        gradients()
        seen = {f"{n} (step {number})": whole(p.grad) for n, p in adapters().items()}
        record.setdefault("gradients", {}).update(seen)
        if optimizer is not None:
            optimizer.step()
        step.clear_gradients(model)
        record.setdefault("numbers", {})[f"after step {number}"] = numbers(adapters())


def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy of a tensor of which each rank may hold a part; all ranks have to ask."""
    if tensor is None:
        return None
    gather = getattr(tensor.detach(), "full_tensor", None)
    gathered: torch.Tensor = tensor.detach() if gather is None else gather()
    return gathered.clone()


def numbers(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A digest of each tensor."""
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def of_base(model: nn.Module, adapters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """A digest of each tensor of the base. The biases that a quantized layer's own forward casts are left out."""
    recast = {f"{name}.bias" for name, _ in backends.quantized_layers(model)}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return numbers({n: t for n, t in tensors.items() if n not in recast and n not in adapters})


def _digest(tensor: torch.Tensor) -> str:
    held = whole(tensor)
    assert held is not None
    if hasattr(held, "__tensor_flatten__"):  # a subclass, whose numbers are in tensors inside
        return " ".join(_digest(getattr(held, name)) for name in held.__tensor_flatten__()[0])
    return digest(held)


def differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The names whose digest is another now."""
    return [name for name, bits in before.items() if after.get(name, bits) != bits]


def by_name(model: nn.Module, adapters: Mapping[str, nn.Parameter]) -> Callable[[], Mapping[str, nn.Parameter]]:
    """The adapters of a model by name, also where a wrap has put other parameters in the place of its own."""

    def named() -> Mapping[str, nn.Parameter]:
        now = dict(model.named_parameters())
        return {n: now.get(n, p) for n, p in adapters.items()}

    return named


@contextmanager
def recorded(model: nn.Module, record: Record, steps: Callable[[], int]) -> Iterator[None]:
    """Count the runs of each block by forward of the model, and record how checkpoints are called."""
    count: Counter[str] = Counter()
    markers: dict[str, nn.Module] = {}

    def ran(block: str, module: nn.Module, args: Any) -> None:
        if markers.setdefault(block, module) is module:
            count[block] += 1

    handles = []
    for name, block in model.named_modules():
        if is_block(block):
            handles += [m.register_forward_pre_hook(partial(ran, name)) for m in list(block.modules())[1:]]
    with switches.checkpoint_spies() as calls:
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            record["runs"] = {name: number / max(steps(), 1) for name, number in count.items()}
            record["reentrant"] = sorted({call["use_reentrant"] for call in calls})


@contextmanager
def rounded_otherwise(model: nn.Module) -> Iterator[None]:
    """Every module without modules in it returns numbers that are one ulp off: how far rounding alone moves a gradient."""

    def off(name: str, module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        signs = torch.randint(0, 2, output.shape, generator=torch.Generator().manual_seed(key)) * 2 - 1
        return output * (1 + torch.finfo(output.dtype).eps * signs).to(output)

    leaves = [(n, m) for n, m in model.named_modules() if not any(True for _ in m.children())]
    handles = [m.register_forward_hook(partial(off, n)) for n, m in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Alone(Run):
    """One process without the composition: what is expected, and how far rounding moves it."""

    def go(self) -> None:
        self._steps(self.record, lambda model: nullcontext())
        rounded: Record = {}
        self._steps(rounded, rounded_otherwise)
        self.record["rounded"] = rounded["gradients"]

    def _steps(self, record: Record, noise: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
        model, adapters = self.attached()
        before = of_base(model, adapters)
        backwards = 0

        def gradients() -> None:
            nonlocal backwards
            backwards += self._expected(record, model, adapters)

        with recorded(model, record, lambda: backwards), noise(model):
            take_steps(model, lambda: adapters, gradients, record)
        record["changed"] = differing(before, of_base(model, adapters))

    def _expected(self, record: Record, model: nn.Module, adapters: Mapping[str, nn.Parameter]) -> int:
        """Leave the gradients that are expected of a step; the number of backwards that it took."""
        if self.expects != "mean":
            self.backward(model, self.row(0) if self.expects == "row" else self.preparation.batch)
            return 1
        each: list[Gradients] = []
        for rank in range(len(RANKS)):
            self.backward(model, self.row(rank))
            each.append({n: whole(p.grad) for n, p in adapters.items()})
            step.clear_gradients(model)
        record.setdefault("each", []).append(each)
        for name, parameter in adapters.items():
            parts = [gradient for one in each if (gradient := one[name]) is not None]
            parameter.grad = torch.stack(parts).sum(0) / len(RANKS) if parts else None
        return len(RANKS)
