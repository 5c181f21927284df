"""One process: a compiled step, copies, and a run that is resumed in a fresh process."""

import copy
import io
import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kbitcheck.core.errors import Raised
from kbitcheck.observe.composition.steps import Record, Run, by_name, numbers
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.probes.adapters import Attached

STEPS, STOPPED, DROPOUT, RATE = 4, 2, 0.1, 1e-2


class Compiled(Run):
    """Steps of a model that ``torch.compile`` has captured, forward and backward; eager kernels run them, which takes no compiler."""

    counts_runs = False  # hooks would be captured, too

    def wrap(self, model: nn.Module, adapters: Mapping[str, nn.Parameter]) -> nn.Module:
        torch.compiler.set_stance("default")
        compiled: Any = torch.compile(model, backend="aot_eager")
        return compiled  # type: ignore[no-any-return]


class Copies(Run):
    """Steps of a deep copy and of a pickle of the prepared model with adapters."""

    processes = ("one process",)

    def copied(self) -> Mapping[str, Callable[[Any], Any]]:
        """The ways of copying a model, by the name of the copy."""
        return {"the deep copy": copy.deepcopy, "the pickle": unpickled}

    def go(self) -> None:
        parts: list[Record] = []
        for name, way in self.copied().items():
            model, adapters = self.attached()
            record: Record = {"name": name}
            parts.append(record)
            try:
                self.train(Attached(way(model), dict(adapters)), record)
            except Exception as error:
                record["raised"] = Raised.of(error)
        self.record["parts"] = parts

    def train(self, attached: Attached, record: Record) -> None:
        """The steps of a copy, whose adapters have the names of the original's."""
        own, self.record = self.record, record
        try:
            names = by_name(attached.model, attached.adapters)()
            self.trained(Attached(attached.model, dict(names)))
        finally:
            self.record = own


def unpickled(model: Any) -> Any:
    """What a pickle of a model is loaded as."""
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    return pickle.loads(buffer.getvalue())  # noqa: S301


class Resumed(Run):
    """A run with dropout and a schedule, stopped between two steps, saved, and continued in a fresh process."""

    processes = ("the whole run", "the resumed run")
    in_turn = True

    def go(self) -> None:
        model, adapters = self.attached()
        switches.set_dropout(model, DROPOUT)
        trainable = [p for p in adapters.values() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=RATE)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        parts = {"optimizer": optimizer, "scheduler": scheduler}
        first = 1
        if self.rank:
            self.load(adapters, parts)
            first = STOPPED + 1
        for number in range(first, STEPS + 1):
            self._step(number, model, adapters, parts)
            if number == STOPPED and not self.rank:
                torch.save(self.saved(adapters, parts), self.file)

    @property
    def file(self) -> Path:
        """Where the run is saved."""
        return Path(self.folder, "saved.pt")

    def saved(self, adapters: Mapping[str, nn.Parameter], parts: Mapping[str, Any]) -> dict[str, Any]:
        """What a script saves."""
        state = {name: part.state_dict() for name, part in parts.items()}
        states = {"random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        return {"adapters": {n: p.detach().clone() for n, p in adapters.items()}, **state, **states}

    def load(self, adapters: Mapping[str, nn.Parameter], parts: Mapping[str, Any]) -> None:
        """What a script does to go on."""
        saved = torch.load(self.file, weights_only=False)
        for name, parameter in adapters.items():
            parameter.data.copy_(saved["adapters"][name])
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        random.setstate(saved["random"])
        np.random.set_state(saved["numpy"])
        torch.set_rng_state(saved["torch"])

    def _step(
        self, number: int, model: nn.Module, adapters: Mapping[str, nn.Parameter], parts: Mapping[str, Any]
    ) -> None:
        moment = f"before step {number}"
        self.record.setdefault("numbers", {})[moment] = numbers(adapters)
        self.record.setdefault("rates", []).append(parts["scheduler"].get_last_lr()[0])
        model.train()
        batch = self.row(random.randrange(2) ^ int(np.random.randint(2)))  # noqa: S311
        with self.preparation.autocast():
            loss = model(**step.feed(model, batch)).loss
        loss.backward()
        self.record.setdefault("losses", []).append(loss.detach().double().item().hex())
        self.record["numbers"][f"gradients of step {number}"] = numbers(
            {n: p.grad for n, p in adapters.items() if p.grad is not None}
        )
        parts["optimizer"].step()
        parts["scheduler"].step()
        step.clear_gradients(model)
        self.record["numbers"][f"after step {number}"] = numbers(adapters)
