"""What is done between steps of training, and other circumstances of a step, which change nothing of what it gives."""

import copy
import io
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from kbitcheck.observe import internals
from kbitcheck.observe.probes import forwards, step
from kbitcheck.observe.uses.subject import Outcome, Parameters, Subject, Value, attempt, done, use

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # as torchrun sets them
RANK, RATE, STEPS = 16, 0.5, 3
PATIENCE = 120.0  # seconds for a step that takes a part of one


@use
def steps_with_something_between(subject: Subject) -> Outcome:
    """A step after the model was printed, saved, generated from, and so on: each is to give what it gives with the base."""
    model: Any
    model, adapters = subject.attached()
    own = subject.model
    actions: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "printing": lambda: repr(model),
        "two calls of train": lambda: model.train().train(),
        "an evaluation": lambda: subject.logits(model),
        "an evaluation in inference mode": lambda: subject.logits(model, without=torch.inference_mode),
        "a forward without gradients": lambda: _forward(subject, model),
        "a state dict": model.state_dict,
        "a save": lambda: _saved(own),
        "a copy": lambda: copy.deepcopy(model),
        "a count of bytes": lambda: own.get_memory_footprint(),
    }
    if subject.preparation.loaded.generator:
        actions["a generation"] = lambda: forwards.token_by_token(model, subject.batch)
    seen: dict[str, Value] = {}
    for name, action in actions.items():
        hooks = _hooks(model)
        seen[name] = attempt(partial(_done, action))
        seen[f"hooks that {name} adds"] = str(_hooks(model) - hooks)
        seen |= {f"{what}, after {name}": value for what, value in subject.step(model, adapters).items()}
    return seen


def _hooks(model: nn.Module) -> int:
    return sum(map(internals.hook_count, model.modules()))


def _done(action: Callable[[], Any]) -> str:
    action()
    return "done"


def _forward(subject: Subject, model: Any) -> None:
    with torch.no_grad():
        subject.loss(model)


def _saved(model: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)


@use
def a_step_in_another_thread(subject: Subject) -> Outcome:
    """In which torch has two threads of its own."""
    model, adapters = subject.attached()

    def take() -> Outcome:
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            return subject.step(model, adapters)
        finally:
            torch.set_num_threads(threads)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(take).result()


@use
def adapters_that_start_at_zero(subject: Subject) -> Outcome:
    """As PEFT's do, and of a larger rank: the first factor moves from the second step on."""
    attached = subject.with_peft(drawn=False, r=RANK)
    if attached is None:
        return {}
    optimizer = torch.optim.SGD(attached.adapters.values(), lr=RATE)
    seen: dict[str, Value] = {}
    for number in range(1, STEPS + 1):
        gathered = subject.step(*attached)
        seen |= {f"{what}, in step {number}": value for what, value in gathered.items()}
        for name, parameter in attached.adapters.items():
            gradient = gathered[f"gradient of {name}"]
            parameter.grad = gradient if isinstance(gradient, torch.Tensor) else None
        optimizer.step()
        optimizer.zero_grad()
    return seen


@use
def a_step_under_settings_of_the_user(subject: Subject) -> Outcome:
    """As who looks for a fault, or saves memory, sets them: for the process, and for what autograd keeps."""
    model, adapters = subject.attached()
    settings: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "deterministic algorithms": _deterministic,
        "detection of anomalies": torch.autograd.detect_anomaly,
        "activations on the CPU": torch.autograd.graph.save_on_cpu,
    }
    seen: dict[str, Value] = {}
    for name, under in settings.items():
        parts = done(partial(_step_under, under=under, model=model, adapters=adapters), subject)
        seen |= {f"{what}, with {name}" if what else f"a step with {name}": value for what, value in parts.items()}
    return seen


def _step_under(
    subject: Subject, under: Callable[[], AbstractContextManager[Any]], model: nn.Module, adapters: Parameters
) -> Outcome:
    with under():
        return subject.step(model, adapters)


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@use
def prepared_under_a_launcher(subject: Subject) -> Outcome:
    """With the environment variables of a process that ``torchrun`` started."""
    if not subject.preparation.loaded.copies:
        return {}
    with mock.patch.dict(os.environ, LAUNCHED):
        return subject.step(*subject.attached(subject.another()))


@use
def a_step_in_a_forked_process(subject: Subject) -> Outcome:
    """As notebooks launch training, of a model that a cell before prepared; accelerators do not run in such a process."""
    accelerated = torch.cuda.is_initialized() or step.device(subject.batch).type != "cpu"
    if accelerated or subject.preparation.loaded.large or "fork" not in multiprocessing.get_all_start_methods():
        return {}
    model, adapters = subject.attached()
    forked = multiprocessing.get_context("fork")
    ours, theirs = forked.Pipe(duplex=False)

    def take() -> None:
        torch.set_num_threads(1)  # of the other threads none is in this process
        seen = done(lambda subject: subject.step(model, adapters), subject)
        saved = io.BytesIO()
        torch.save(dict(seen), saved)
        theirs.send_bytes(saved.getvalue())

    process = forked.Process(target=take)
    process.start()
    theirs.close()
    try:
        if not ours.poll(PATIENCE):
            return {"the process": "no answer"}
        return {"the process": "answers", **torch.load(io.BytesIO(ours.recv_bytes()), weights_only=False)}
    except EOFError:
        return {"the process": "no answer"}
    finally:
        process.kill()
        process.join()
