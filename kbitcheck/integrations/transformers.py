"""For transformers' ``Trainer`` and what is built on it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_CONFORMS, Report
from kbitcheck.report import verdict
from kbitcheck.run import watch
from kbitcheck.run.watch_settings import Settings

__all__ = ["Watch"]

logger = logging.get_logger(__name__)


class Watch(TrainerCallback):
    """Judges the first optimizer steps of a Trainer, and changes no bit of them: ``Trainer(..., callbacks=[Watch()])``.

    The arguments are those of ``kbitcheck.watch`` behind model and optimizer. The verdict goes to transformers' log and to the trainer's
    ``state.log_history``; ``report`` is None until training has begun, and complete when the steps were taken. A model that is
    not quantized is not watched.
    """

    def __init__(self, **options: Any) -> None:
        self._settings = Settings(**options)
        self._settings.validate()
        self._watch: Any = None
        self._told = False

    @property
    def report(self) -> Report | None:
        """What was judged until now."""
        return None if self._watch is None else self._watch.report

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        try:
            self._watch = watch.Watch(model, others.get("optimizer"), self._settings)
        except UsageError as error:
            logger.warning("kbitcheck watches nothing: %s", error)
            return
        self._watch.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._watch is not None and self._watch.over:
            self._tell(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._tell(state)

    def _tell(self, state: Any) -> None:
        if self._told:
            return
        self._told = True
        report = self._watch.report
        said = {"kbitcheck": verdict(report), "kbitcheck_exit_code": report.exit_code, "step": state.global_step}
        state.log_history.append(said)
        logger.warning("kbitcheck: %s", said["kbitcheck"])
        if report.exit_code != EXIT_CONFORMS:
            logger.warning("%s", report)
