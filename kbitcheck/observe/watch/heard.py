"""Listens to warnings of a run, and hears those that say how the model trains. Imports little: it listens from a script's first line on."""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any, Self

from kbitcheck.backends import registry
from kbitcheck.core.facts import HeardWarning

LENGTH = 160  # of a warning in a report
# Beginnings of what says that something does not train, where a forward takes gradients; backends have others.
GRAVE = {
    r"None of the inputs have requires_grad=True": "checkpointing",
}
# What is worth a note: a choice that a library made by itself.
NOTED = {
    r"torch.utils.checkpoint: the use_reentrant parameter should be passed explicitly": "checkpointing",
    r"Caching is incompatible with gradient checkpointing": "cache",
    r"`use_cache=True` is incompatible with gradient checkpointing": "cache",
    r"A decoder-only architecture is being used, but right-padding was detected": "generation",
    r"Token indices sequence length is longer than the specified maximum": "length",
    r"Model (with|has) `tie_word_embeddings=True` and (a|the) (tied layer is|tied_target_modules=.* are) part of the adapter": "tie",
    r"Some weights of \w+ were not initialized from the model checkpoint": "weights",
}


class Heard:
    """While it is entered, hears what ``warnings`` shows and what libraries log as a warning; both go on to where they go."""

    def __init__(self) -> None:
        self.warnings: dict[HeardWarning, None] = {}
        self.takes_gradients = True  # the forward that runs, as far as is seen
        self._of_backends: dict[str, str] = {}
        self._show: Any = None
        self._own: Any = None
        self._handle: Any = None
        self._logged: Any = None

    def __enter__(self) -> Self:
        for backend in registry.available():
            self._of_backends.update(backend.warnings())
        self._own, self._handle = warnings.showwarning, logging.Logger.callHandlers

        def show(message: Any, *args: Any, **kwargs: Any) -> Any:
            self._hear(str(message))
            return self._own(message, *args, **kwargs)

        def handle(logger: Any, record: logging.LogRecord) -> Any:
            if record.levelno == logging.WARNING:
                self._hear(str(record.msg))
            return self._handle(logger, record)

        self._show = warnings.showwarning = show
        self._logged = handle
        logging.Logger.callHandlers = handle  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: object) -> None:
        if warnings.showwarning is self._show:  # else someone put another in its place, or took it off
            warnings.showwarning = self._own
        if logging.Logger.callHandlers is self._logged:
            logging.Logger.callHandlers = self._handle  # type: ignore[method-assign]

    def _hear(self, text: str) -> None:
        own = GRAVE if self.takes_gradients else {}
        for patterns, grave in ((own, True), (self._of_backends, True), (NOTED, False)):
            for pattern, about in patterns.items():
                if re.match(pattern, text):
                    line = " ".join(text.split())
                    short = line if len(line) <= LENGTH else line[:LENGTH].rpartition(" ")[0] + " …"
                    self.warnings[HeardWarning(about=about, text=short, grave=grave)] = None
