"""Steps that a user may take between two training steps, in any order, each training step beside a fresh model's."""

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from kbitcheck_reference import lora
from safetensors.torch import load, save
from torch import nn

from kbitcheck import backends
from kbitcheck.core import machine
from kbitcheck.core.errors import Raised
from kbitcheck.core.facts import StepOutcome
from kbitcheck.models.inputs.text import first_rows
from kbitcheck.observe import internals, moves
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes import digest, step, switches
from kbitcheck.observe.probes.adapters import Attached
from kbitcheck.observe.probes.forwards import generate
from kbitcheck.observe.probes.layers import base_name

# What KB308 runs in each case.
STANDARD_ORDER = (
    "train", "evaluate", "infer", "generate", "eval-mode", "copy", "train", "prepare", "save", "update", "accumulate",
    "checkpointing-off", "evaluate", "move", "state-dict", "offload", "adapters-off", "checkpointing-non-reentrant",
    "dispatch", "train", "undispatch", "offload-to-disk", "reload", "train",
)  # fmt: skip
# What it runs once more, as a user's own training does it, where a machine makes that another one.
UNSTEADY_ORDER = ("evaluate", "train", "state-dict", "train")
HOOKING = ("prepare", "reattach", "checkpointing", "reload")  # these put hooks on by design; KB505 counts them
CHECKPOINTING = {"checkpointing-off": None, "checkpointing-reentrant": True, "checkpointing-non-reentrant": False}


class _Settings(NamedTuple):
    """What is switched on or around the model; ``checkpointing`` is None until it is switched."""

    checkpointing: str | None = None
    autocast: bool = False
    rows: int = sys.maxsize


class _Trained(NamedTuple):
    """A training step's gradients, and all that a fresh model needs to take the same one."""

    gradients: step.Gradients
    checkpoints: int
    times: int
    settings: _Settings
    adapters: Sequence[torch.Tensor]
    biases: Mapping[str, torch.Tensor]


class Session:
    """One prepared model with adapters, and the steps that it has taken so far; ``make`` gives a fresh one."""

    def __init__(self, preparation: Preparation, make: Callable[[], Attached]) -> None:
        self.preparation, self.make, self.settings = preparation, make, _Settings()
        self.model: Any
        _ = preparation.loaded.generator  # which runs a base of its own, as moves do
        self._moves = self._borne()
        self.model, self.adapters = make()
        self._lease = preparation.loaded.lease
        self._packed = self._fingerprints()
        self._fresh: dict[tuple[Any, ...], tuple[step.Gradients, int]] = {}
        self._names: list[str] = []
        self._ran: list[str] = []

    def programs(self) -> list[StepOutcome]:
        """Those of KB308."""
        return [*self.run(STANDARD_ORDER), *self._as_users_run_it()]

    def _as_users_run_it(self) -> list[StepOutcome]:
        """Steps with all that ``backends.steady`` switches off, where it matters; not of a caller's own model, which would keep it."""
        loaded = self.preparation.loaded
        if not loaded.copies or not (unsteady := backends.unsteady(loaded.pristine)):
            return []
        with self.preparation.released():
            taken = Session(self.preparation, self.make).run(UNSTEADY_ORDER)
        return [replace(outcome, step=f"as users run it: {outcome.step}", unsteady=unsteady) for outcome in taken]

    def run(self, names: Sequence[str]) -> list[StepOutcome]:
        """Take the steps, drop the model, and only then make fresh ones: two would be twice the memory."""
        taken = [self._take(name) for name in names]
        assert self.preparation.loaded.lease is self._lease, "another stage took the model meanwhile"
        self.model, self.adapters = None, {}
        return [self._judge(*each) for each in taken]

    def do(self, name: str) -> StepOutcome:
        """Take one step; what it raises, and what it changed, is in the outcome."""
        return self._judge(*self._take(name))

    def _take(self, name: str) -> tuple[StepOutcome, _Trained | None]:
        """The outcome is complete but for what a fresh model makes of a training step."""
        action, hooks, raised, trained = ACTIONS[name], _hooks(self.model), None, None
        try:
            trained = action(self, name)
        except Exception as error:
            raised = Raised.of(error)
        now = self._fingerprints()
        # transformers hooks some models for good in their first forward.
        repeated = name in self._ran and not name.startswith(HOOKING)
        self._ran = [] if name == "reload" else [*self._ran, name]  # another model
        self._names.append(name)
        outcome = StepOutcome(
            step=f"{len(self._names)} {name}",
            raised=raised,
            changed=tuple(n for n, bits in self._packed.items() if now.get(n) != bits),
            hooks_added=max(0, _hooks(self.model) - hooks) if repeated else 0,
            gradients={},
        )
        return outcome, trained

    def _judge(self, outcome: StepOutcome, mine: _Trained | None) -> StepOutcome:
        if mine is None:
            return outcome
        try:
            fresh, calls = self._fresh_gradients(mine)
        except Exception as error:
            return replace(outcome, raised=Raised.of(error))
        # A fresh model's names may come from another copy of the wrapper, in the same order.
        expected = dict(zip(mine.gradients, fresh.values(), strict=True))
        gradients = step.distances(mine.gradients, expected, {})
        return replace(outcome, gradients=gradients, checkpoints=(mine.checkpoints, calls))

    def _fingerprints(self) -> dict[str, str]:
        return self._fingerprints_of(self.model)

    def _fingerprints_of(self, model: nn.Module) -> dict[str, str]:
        """Digest of each quantized layer's packed weight and state, by the base's name."""
        prints = {}
        for name, module in self._quantized(model):
            recognition = backends.recognition(module)
            state = recognition.state(module)
            prints[name] = digest.bits(recognition.packed(module)) + "".join(map(digest.of, state.values()))
        return prints

    def _quantized(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        names = self.preparation.loaded.weights.layers
        return ((base_name(name, names), layer) for name, layer in backends.holders(model))

    def train(self, name: str) -> _Trained:
        times = 2 if name == "accumulate" else 1
        adapters = [p.detach().clone() for p in self.adapters.values()]
        biases = {n: m.bias.detach().clone() for n, m in self._quantized(self.model) if _bias(m)}
        gradients, calls = self._gradients(self.model, self.adapters, self.settings, times)
        return _Trained(gradients, calls, times, self.settings, adapters, biases)

    def update(self, name: str) -> None:
        optimizer = torch.optim.AdamW(self.adapters.values(), lr=1e-3, weight_decay=0.1)
        gradients, _ = self._gradients(self.model, self.adapters, self.settings, 1)
        for parameter, gradient in zip(self.adapters.values(), gradients.values(), strict=True):
            parameter.grad = gradient
        optimizer.step()
        step.clear_gradients(self.model)

    def _gradients(
        self, model: Any, adapters: Mapping[str, nn.Parameter], settings: _Settings, times: int, *, apart: bool = False
    ) -> tuple[step.Gradients, int]:
        """Gradients of ``times`` accumulated steps (``apart``: added up afterwards), and the number of torch's checkpoints."""
        total: step.Gradients = {}
        calls = 0
        for turn in range(times):
            with switches.dropout(model, 0.0):
                run, gradients = step.train_step(
                    model,
                    first_rows(self.preparation.batch, settings.rows),
                    adapters,
                    seed=self.preparation.spec.seed + turn,
                    autocast=self._autocast(settings),
                    watch=False,
                    gathered=None if apart else total,
                )
            total = {n: _sum(total.get(n), g) for n, g in gradients.items()} if apart else gradients
            calls += len(run.checkpoints)
        return total, calls

    def _fresh_gradients(self, trained: _Trained) -> tuple[step.Gradients, int]:
        settings, biases = trained.settings, trained.biases
        key = (settings, trained.times, *map(digest.bits, trained.adapters), *map(digest.of, biases.values()))
        if key not in self._fresh:
            model, adapters = self.make()
            for mine, other in zip(adapters.values(), trained.adapters, strict=True):
                mine.data.copy_(other)
            # A forward may recast a quantized layer's own bias: KB104 tells, and this goes on from it.
            for name, module in self._quantized(model):
                if name in biases:
                    module.bias.data = biases[name].clone()
            if settings.checkpointing:
                switch(model, settings.checkpointing)
            self._fresh[key] = self._gradients(model, adapters, settings, trained.times, apart=True)
        return self._fresh[key]

    def _autocast(self, settings: _Settings) -> step.Autocast:
        if not settings.autocast:
            return self.preparation.autocast
        return partial(torch.autocast, step.device(self.preparation.batch).type, dtype=self.preparation.loaded.half)

    def look(self, name: str) -> None:
        with torch.inference_mode() if name == "infer" else torch.no_grad():
            self._evaluate(self.model)

    @torch.no_grad()
    def _evaluate(self, model: Any) -> None:
        model.eval()
        batch = first_rows(self.preparation.batch, self.settings.rows)
        with self._autocast(self.settings)():
            model(**step.feed(model, batch))

    def adapters_off(self, name: str) -> None:
        """An evaluation of the base, as for a reference model, where the adapters' library has a switch."""
        if hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                self.look(name)

    def generate(self, name: str) -> None:
        if not self.preparation.loaded.generator:
            return
        with self._autocast(self.settings)():
            result = generate(self.model, self.preparation.batch)
        if result.raised:
            raise RuntimeError(str(result.raised))

    def prepare(self, name: str) -> None:
        self.model = self.preparation.apply(self.model)
        for parameter in self.adapters.values():  # whether they stay trainable is KB106's to say
            parameter.requires_grad_(True)
        if self.settings.checkpointing:
            switch(self.model, self.settings.checkpointing)

    def reattach(self, name: str) -> None:
        bare = self.model.unload() if hasattr(self.model, "unload") else lora.detach(self.model)
        self.model, self.adapters = self.preparation.attach(bare)

    def save(self, name: str) -> None:
        """Adapters as in a file; what was there in between is lost."""
        saved = save({n: p.detach().clone().contiguous() for n, p in self.adapters.items()})
        for parameter in self.adapters.values():
            parameter.data.fill_(math.nan)
        for adapter, numbers in load(saved).items():
            self.adapters[adapter].data.copy_(numbers)

    def checkpointing(self, name: str) -> None:
        if getattr(self.model, "supports_gradient_checkpointing", False):
            switch(self.model, name)
            self.settings = self.settings._replace(checkpointing=name)

    def mode(self, name: str) -> None:
        self.model.train(name == "train-mode")

    def autocast(self, name: str) -> None:
        self.settings = self.settings._replace(autocast=name == "autocast-on")

    def batch(self, name: str) -> None:
        self.settings = self.settings._replace(rows=1 if name == "batch-one" else sys.maxsize)

    def copy(self, name: str) -> None:
        if not self.preparation.loaded.copies:
            return
        memo: dict[int, Any] = {}
        machine.return_free_pages()
        self.model = copy.deepcopy(self.model, memo)
        self.adapters = {n: memo[id(p)] for n, p in self.adapters.items()}

    def _borne(self) -> frozenset[str]:
        loaded = self.preparation.loaded
        if not loaded.copies:
            return frozenset()
        return loaded.once("moves", moves.borne, self._try_moves)

    def _try_moves(self) -> frozenset[str]:
        loaded = self.preparation.loaded
        reloads = moves.reloads(loaded.copy(), self._reloaded, self._evaluate, self._fingerprints_of)
        return moves.borne(loaded.copy(), self._evaluate) | ({"reload"} if reloads else frozenset())

    def _reloaded(self, folder: str) -> Any:
        return self.preparation.loaded.reload(folder, self.preparation.spec.device)

    def reload(self, name: str) -> None:
        """A base that was evaluated and saved is loaded from its checkpoint, prepared, and gets the adapters as they are."""
        if name not in self._moves:
            return
        numbers = [p.detach().clone() for p in self.adapters.values()]
        base = moves.through_a_checkpoint(self.preparation.copy(), self._reloaded, self._evaluate)
        self.model, self.adapters = self.preparation.attach(self.preparation.apply(base))
        for parameter, own in zip(self.adapters.values(), numbers, strict=True):
            parameter.data.copy_(own)
        if self.settings.checkpointing:
            switch(self.model, self.settings.checkpointing)

    def move(self, name: str) -> None:
        """Of a caller's own model, which is on as many devices as the caller says, the first alone is asked for again."""
        if name == "move" and not self.preparation.loaded.copies:
            self.model.to(next(self.model.parameters()).device)
        if name in self._moves:
            move = partial(moves.MOVES[name], self.model, self._evaluate)
            self.adapters = moves.parameters_after(self.model, self.adapters, move)


ACTIONS: Mapping[str, Callable[[Session, str], _Trained | None]] = {
    "train": Session.train,
    "accumulate": Session.train,
    "update": Session.update,
    "evaluate": Session.look,
    "infer": Session.look,
    "generate": Session.generate,
    "prepare": Session.prepare,
    "reattach": Session.reattach,
    "save": Session.save,
    **dict.fromkeys(CHECKPOINTING, Session.checkpointing),
    "train-mode": Session.mode,
    "eval-mode": Session.mode,
    "autocast-on": Session.autocast,
    "autocast-off": Session.autocast,
    "batch-one": Session.batch,
    "batch-whole": Session.batch,
    "copy": Session.copy,
    "adapters-off": Session.adapters_off,
    **dict.fromkeys(moves.MOVES, Session.move),
    "reload": Session.reload,
}
STEPS = tuple(ACTIONS)


def switch(model: Any, name: str) -> None:
    """Checkpointing off, or on in a mode, by the model's own methods."""
    if name == "checkpointing-off":
        switches.quietly(model.gradient_checkpointing_disable)
    else:
        switches.quietly(lambda: model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[name]}))
        model.enable_input_require_grads()


def _bias(module: Any) -> bool:
    return getattr(module, "bias", None) is not None


def _hooks(model: nn.Module) -> int:
    return sum(internals.hook_count(m) for m in model.modules())


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b
