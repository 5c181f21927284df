"""A run that is stopped and resumed in a fresh process: a loop by hand, stopped within an accumulation, and a real ``Trainer``."""

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kbitcheck.core.errors import Unavailable
from kbitcheck.models.inputs.text import row_count
from kbitcheck.observe.composition.steps import Run, numbers
from kbitcheck.observe.composition.trainers import InTrainer, quiet
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.unwatched.steps import digest

STEPS, ACCUMULATED, DROPOUT, RATE = 4, 2, 0.1, 1e-2
PASSES = STEPS * ACCUMULATED
STOPPED = 5  # passes before the run is saved: one of the two of the third step
PROCESSES = ("the whole run", "the resumed run")
UNREAD = -100  # a label that no loss reads


class Order:
    """Numbers of the data's rows in a drawn order, which is drawn anew once all are read, and the place in it."""

    def __init__(self, rows: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._rows, self._order, self._place = rows, list[int](), rows

    def __next__(self) -> int:
        if self._place == self._rows:
            self._order, self._place = torch.randperm(self._rows, generator=self._generator).tolist(), 0
        self._place += 1
        return self._order[self._place - 1]

    def state_dict(self) -> dict[str, Any]:
        """The order, the place in it, and the state from which the next one is drawn."""
        return {"order": self._order, "place": self._place, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at that place."""
        self._order, self._place = state["order"], state["place"]
        self._generator.set_state(state["generator"])


class Accumulation:
    """How many passes of a step are done, and the gradients that they left."""

    def __init__(self, adapters: Mapping[str, nn.Parameter]) -> None:
        self._adapters, self.passes = adapters, 0

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients so far, by adapter."""
        return {n: p.grad.detach().clone() for n, p in self._adapters.items() if p.grad is not None}

    def state_dict(self) -> dict[str, Any]:
        """Counter and gradients."""
        return {"passes": self.passes, "gradients": self.gradients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on within the step."""
        self.passes = state["passes"]
        for name, gradient in state["gradients"].items():
            self._adapters[name].grad = gradient.clone()


def unlike_rows(run: Run) -> list[step.Batch]:
    """A row for each pass, all of them unlike: those of the batch in turn, each without one more of its labels."""
    count = row_count(run.preparation.batch)
    rows: list[step.Batch] = []
    for number in range(PASSES):
        row = {name: tensor.clone() for name, tensor in run.row(number % min(count, 2)).items()}
        read = (row["labels"] != UNREAD).nonzero() if "labels" in row else torch.empty(0)
        if number >= 2 and len(read) > number:
            row["labels"][tuple(read[number // 2])] = UNREAD
        rows.append(row)
    return rows


def state_digest(state: Any) -> str:
    """A digest of what a ``state_dict`` returns, or of a random state."""
    if isinstance(state, torch.Tensor):
        return digest(state)
    if isinstance(state, np.ndarray):
        return digest(torch.from_numpy(state.astype(np.int64)))
    if isinstance(state, Mapping):
        state = {str(key): state_digest(value) for key, value in state.items()}
        return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=8).hexdigest()
    if isinstance(state, list | tuple):
        return state_digest(dict(enumerate(map(state_digest, state)))) if state else "none"
    return repr(state)


def random_states() -> dict[str, str]:
    """A digest of the state of each generator of random numbers."""
    return {
        "random state of python": state_digest(random.getstate()),
        "random state of numpy": state_digest(np.random.get_state()),
        "random state of torch": state_digest(torch.get_rng_state()),
    }


class Resumed(Run):
    """A loop with dropout, a schedule, a gradient scaler and accumulated rows in a drawn order. It is saved within an accumulation."""

    processes, in_turn = PROCESSES, True

    def go(self) -> None:
        model, adapters = self.attached()
        switches.set_dropout(model, DROPOUT)
        optimizer = torch.optim.AdamW([p for p in adapters.values() if p.requires_grad], lr=RATE)
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        parts = {
            "optimizer": optimizer,
            "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS),
            "scaler": torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2),
            "order": Order(PASSES, self.seed),
            "accumulation": Accumulation(adapters),
        }
        self.rows = unlike_rows(self)
        first, self.record["saved_behind"] = 1, STOPPED
        if self.rank:
            self.load(adapters, parts)
            first = STOPPED + 1
        for number in range(first, PASSES + 1):
            self._pass(model, adapters, parts)
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

    def _pass(self, model: nn.Module, adapters: Mapping[str, nn.Parameter], parts: Mapping[str, Any]) -> None:
        """One forward and backward, and a step of the optimizer behind the last of an accumulation."""
        accumulation, scaler = parts["accumulation"], parts["scaler"]
        seen = {
            "adapters": state_digest(adapters),
            "optimizer": state_digest(parts["optimizer"].state_dict()),
            "scheduler": state_digest(parts["scheduler"].state_dict()),
            "gradient scaler": state_digest(scaler.state_dict()),
            "order of the data": state_digest(parts["order"].state_dict()),
            "accumulation's counter": str(accumulation.passes),
            "accumulated gradients": state_digest(accumulation.gradients),
            **random_states(),
        }
        model.train()
        weight = 1 + random.random() + float(np.random.random())  # noqa: S311
        batch = self.rows[next(parts["order"])]
        with self.preparation.autocast():
            loss = model(**step.feed(model, batch)).loss * (weight / ACCUMULATED)
        scaler.scale(loss).backward()
        seen["loss"] = state_digest(loss)
        seen["gradients"] = state_digest(accumulation.gradients)
        accumulation.passes += 1
        if accumulation.passes == ACCUMULATED:
            scaler.step(parts["optimizer"])
            scaler.update()
            parts["scheduler"].step()
            step.clear_gradients(model)
            accumulation.passes = 0
        seen["adapters behind it"] = state_digest(adapters)
        self.record.setdefault("passes", []).append(seen)


class ResumedTrainer(InTrainer):
    """A real ``Trainer`` with dropout and accumulated rows in a drawn order, resumed from the checkpoint that another one saved."""

    processes, in_turn = PROCESSES, True
    accumulated = ACCUMULATED

    def rows(self) -> list[dict[str, torch.Tensor]]:
        return [self._example(row) for row in unlike_rows(self)]

    def options(self) -> dict[str, Any]:
        """Saved once, in the middle."""
        saved = {"save_strategy": "steps", "save_steps": STEPS // 2, "lr_scheduler_type": "linear"}
        return {**super().options(), **saved, "max_steps": STEPS, "learning_rate": RATE}

    @property
    def checkpoint(self) -> Path:
        """The folder that the Trainer saves in the middle."""
        return Path(self.folder, f"checkpoint-{STEPS // 2}")

    def go(self) -> None:
        model, adapters = self.attached()
        if not hasattr(model, "peft_config"):
            raise Unavailable("a Trainer saves adapters of PEFT alone")
        switches.set_dropout(model, DROPOUT)
        trainer = self.trainer(model)
        own = trainer.training_step

        def stepped(model: nn.Module, inputs: step.Batch, *args: Any, **keywords: Any) -> Any:
            seen = {
                "adapters": numbers_of(adapters),
                "optimizer": state_digest(trainer.optimizer.state_dict()),
                "scheduler": state_digest(trainer.lr_scheduler.state_dict()),
                "step": str(trainer.state.global_step),
                "order of the data": state_digest(inputs),
                **random_states(),
            }
            loss = own(model, inputs, *args, **keywords)
            seen["loss"] = state_digest(loss)
            seen["gradients"] = state_digest({n: p.grad for n, p in adapters.items()})
            self.record.setdefault("passes", []).append(seen)
            return loss

        trainer.training_step = stepped
        self.record["saved_behind"] = STEPS // 2 * ACCUMULATED
        with quiet():
            trainer.train(**self.resumed())
        self.record["passes"][-1]["adapters behind it"] = numbers_of(adapters)

    def resumed(self) -> dict[str, Any]:
        """What a script passes ``train``."""
        return {"resume_from_checkpoint": str(self.checkpoint)} if self.rank else {}


def numbers_of(adapters: Mapping[str, nn.Parameter]) -> str:
    """One digest of all adapters."""
    return state_digest(numbers(adapters))
