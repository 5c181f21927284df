"""In the process of a watched command: waits for a quantized model's first forward in training, and writes the report of it."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from kbitcheck.core.compositions import meaning_of
from kbitcheck.core.errors import UsageError, cause
from kbitcheck.observe.watch import LENT
from kbitcheck.observe.watch.built import Built
from kbitcheck.observe.watch.guard import take_off
from kbitcheck.observe.watch.heard import Heard
from kbitcheck.report.output_file import replace_file
from kbitcheck.run import ranks
from kbitcheck.run.watch_settings import CASE, Settings

if TYPE_CHECKING:
    from kbitcheck.run.watch import (
        Watch,
    )  # brings facts and reports, which a script without a quantized model has no use for

FRAMES = 8  # between a hook and the call of its module


class _Waiting:
    """Looks at each module that runs in training until one of them holds a quantized layer, and then watches that."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._process = os.getpid()
        self._seen: set[int] = set()
        self._steps = 0
        self._ran = False  # a forward in training, since the last step
        self._switched_on: list[Any] = []
        self._enabling: Any = None
        self._heard = Heard()
        self._built = Built()
        self._watch: Watch | None = None
        self._left: Watch | None = None  # of a model that the script trained before the one that it trains now
        self._written = False
        self._removals: list[Callable[[], None]] = []

    def begin(self) -> None:
        """Put hooks on every forward and every optimizer's step."""
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._removals = [
            register_module_forward_pre_hook(self._runs).remove,
            partial(take_off, register_optimizer_step_post_hook(self._stepped)),
            self._built.__enter__().__exit__,
        ]
        atexit.register(self._end)

    def see_checkpointing(self) -> None:
        """Look at what switches checkpointing on, once transformers is there."""
        cls = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
        if self._enabling is None and cls is not None:
            from kbitcheck.observe.watch.enabling import Enabling

            self._enabling = Enabling(cls, self._switched_on.append)
            self._enabling.__enter__()
            self._heard.__enter__()

    def _runs(self, module: Any, args: Any) -> None:
        import torch

        self._heard.takes_gradients = torch.is_grad_enabled()
        if not torch.is_grad_enabled() or LENT in vars(module):
            return
        self._ran = True
        if id(module) in self._seen:
            return
        try:
            if (self._watch is not None and self._watch.has(module)) or not self._quantized(module):
                self._seen.add(id(module))
                return
            if not (module.training or self._trains(module)):
                return
            self._remove()
            if self._watch is not None:
                self._left, self._watch = self._watch, None
                self._left.stop()
            self._start(module, args)
        except Exception as error:
            self._remove()
            self._fail(error)

    def _quantized(self, module: Any) -> bool:
        from kbitcheck import backends
        from kbitcheck.observe.internals import is_flattened

        # A layer by itself is no model: Unsloth tries one out before it loads a model.
        if any(name for name, _ in backends.quantized_layers(module)) or backends.emptied_schemes(module):
            return True
        libraries = {name for name in self._options["libraries"] if name != "torch"}
        return is_flattened(module) and any(type(m).__module__.split(".")[0] in libraries for m in module.modules())

    def _trains(self, module: Any) -> bool:
        """Whether a model in eval mode has adapters that require grad: then its forward may be a training one."""
        from kbitcheck.observe.meant_to_train import owned

        return any(parameter.requires_grad for parameter in owned(module).values())

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """A script that trains something else is left alone after as many steps as were to be watched."""
        self._steps, self._ran = self._steps + self._ran, False
        if self._removals and self._steps >= self._options["settings"]["steps"]:
            self._remove()

    def _look_again(self) -> None:
        """A script that goes on with another model, as after a trial step of one, is watched in training that; once."""
        from torch.nn.modules.module import register_module_forward_pre_hook

        if self._left is None and not self._removals:
            self._seen.clear()
            self._removals = [register_module_forward_pre_hook(self._runs).remove]

    def _start(self, module: Any, args: Any) -> None:
        from kbitcheck.run.watch import Watch

        settings = Settings(**self._options["settings"])
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            settings = Settings(**{**self._options["settings"], "case": f"{CASE}, rank {os.environ.get('RANK', '0')}"})
        options = {
            "enabled": self._switched_on,
            "heard": self._heard,
            "built": self._built,
            "when_over": self._write,
            "when_strange": self._look_again,
        }
        self._watch = Watch(module, None, settings, **options)
        self._watch.start(_keywords(module), module, args)

    def _remove(self) -> None:
        for remove in self._removals:
            remove()
        self._removals = []
        if self._enabling is not None:
            self._enabling.__exit__()
            self._heard.__exit__()
        self._enabling = None

    def _end(self) -> None:
        """The process ends: what was seen until now is the report."""
        if os.getpid() == self._process and self._watch is not None:
            raised = getattr(sys, "last_value", None)
            if isinstance(raised, Exception) and not self._written:
                self._say(_raised(raised))
            self._watch.stop()

    def _write(self) -> None:
        if os.getpid() != self._process or self._written or self._watch is None:
            return
        self._written = True
        self._remove()
        watch = self._left if self._left is not None and not self._watch.report.subject["steps"] else self._watch
        try:
            rank = int(os.environ.get("RANK", "0"))
            path = Path(self._options["folder"]) / f"{rank:05}-{self._process}.json"
            replace_file(path, ranks.as_text(watch.report, watch.replicas))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._say(str(error) if isinstance(error, UsageError) else f"the watcher failed: {cause(error)}")

    def _say(self, why: str) -> None:
        (Path(self._options["folder"]) / f"failed-{os.getpid()}").write_text(why)


def _raised(error: Exception) -> str:
    """What ended the script before the steps were taken that were to be watched."""
    process = f"rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "the run"
    said = str(error).partition("\n")[0].partition(". ")[0]
    meaning = f": {means}" if (means := meaning_of(str(error))) else ""
    return f"{process} raised {type(error).__name__}: {said}{meaning}"


def _keywords(module: Any) -> Mapping[str, Any]:
    """The keyword arguments of the call of a module whose hook runs now; a hook on every module is not passed them."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(FRAMES):
        if frame is None:
            break
        local = frame.f_locals
        if local.get("self") is module and isinstance(local.get("kwargs"), dict):
            return dict(local["kwargs"])
        frame = frame.f_back
    return {}


_waiting: _Waiting | None = None


def imported(options: Mapping[str, Any]) -> None:
    """The quantizers' libraries are imported; called again where transformers' models are imported after them."""
    global _waiting
    if _waiting is None:
        _waiting = _Waiting(options)
        _waiting.begin()
    _waiting.see_checkpointing()
