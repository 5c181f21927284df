"""What predicted steps are fed with: text, and the images or audio that people train such a model with."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from kbitcheck.core.errors import UsageError
from kbitcheck.models.inputs.audio import audio_beside_text, audio_in_text
from kbitcheck.models.inputs.images import PIXELS, images_beside_text, images_in_text, width_of
from kbitcheck.models.inputs.media import Medium, counted
from kbitcheck.models.inputs.text import draw, widened

SHORT = 16  # tokens of a step that is run to see whether it runs
WIDTH = 1024  # pixels of an image where neither the configuration nor the caller states a size
SOUND = ("input_features", "input_values")
# What a model's code raises without numbers; some assert what they read.
NO_STEP = (UsageError, RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)

Batch = Mapping[str, Tensor]


class Runs(NamedTuple):
    """How a model runs without numbers: a step of a batch, and a function of the model."""

    step: Callable[[Batch], object]
    call: Callable[[Callable[[], Any]], Any]


class _Layout(NamedTuple):
    """Makes batches of a number of rows and of tokens; ``tokens`` come on top of these, ``numbers`` says that the step reads numbers."""

    make: Callable[[int, int], Batch]
    tokens: int = 0
    numbers: bool = False


class Feed:
    """Batches for one model; ``width`` is that of its images in pixels, where its configuration states none.

    The layout of images or audio is the first that a step runs on. ``tokens`` stand for them in each sequence, ``notes`` say what was assumed.
    """

    def __init__(self, model: Any, runs: Runs, *, seed: int, width: int | None) -> None:
        self._model, self._runs, self._seed, self._width = model, runs, seed, width or WIDTH
        self._made: dict[tuple[int, int], Batch] = {}
        self.notes: tuple[str, ...] = ()
        self._layout = self._first()
        self.tokens = self._layout.tokens

    def batch(self, rows: int, length: int, *, padded: bool) -> Batch:
        """Rows of ``length`` tokens beside their images or audio; those that are not ``padded`` have no mask."""
        made = self._batch(rows, length)
        if not padded:  # a mask of ones, which models leave out when they see that it is one
            made = {name: tensor for name, tensor in made.items() if name != "attention_mask"}
        return made

    def _batch(self, rows: int, length: int) -> Batch:
        """Shapes alone, of which at most two rows are drawn, and more are widened from them, unless the step reads numbers."""
        drawn = rows if self._layout.numbers else min(rows, 2)
        if (drawn, length) not in self._made:
            if self._layout.numbers:
                self._made.clear()
            self._made[drawn, length] = self._layout.make(drawn, length)
        made = self._made[drawn, length]
        return made if self._layout.numbers else widened(made, rows)

    def _first(self) -> _Layout:
        accepted = inspect.signature(type(self._model).forward).parameters.keys()
        media = [key for key in (*PIXELS, *SOUND) if key in accepted]
        for layout in self._media() if media else ():
            self.notes = (self._said(layout),)
            return layout
        if media and "input_ids" in accepted:
            kind = "images" if media[0] in PIXELS else "audio"
            name = type(self._model).__name__
            self.notes = (f"activations of text alone: {name} takes its {kind} in no form that kbitcheck supports",)
        return _Layout(self._text)

    def _media(self) -> Iterator[_Layout]:
        """The layouts that a step runs on."""
        for medium in (*images_in_text(self._model, self._width), *audio_in_text(self._model)):
            with suppress(*NO_STEP):
                features = self._runs.call(partial(medium.features, self._model, 1, self._seed))
                yield self._tried(
                    _Layout(partial(self._around, medium, counted(features)), counted(features), numbers=True)
                )
        for make in (*images_beside_text(self._model, self._width), *audio_beside_text(self._model)):
            with suppress(*NO_STEP):
                yield self._tried(_Layout(partial(self._beside, make), numbers=True))

    def _tried(self, layout: _Layout) -> _Layout:
        self._runs.step({name: t for name, t in layout.make(1, SHORT).items() if name != "attention_mask"})
        return layout

    def _around(self, medium: Medium, count: int, rows: int, length: int) -> Batch:
        return medium.around(self._model, count, batch=rows, seq_len=length, seed=self._seed)

    def _beside(self, make: Callable[..., Batch], rows: int, length: int) -> Batch:
        return make(self._model, batch=rows, seq_len=length, seed=self._seed)

    def _text(self, rows: int, length: int) -> Batch:
        return draw(self._model, batch=rows, seq_len=length, seed=self._seed, images=False)

    def _said(self, layout: _Layout) -> str:
        made = layout.make(1, SHORT)
        beside = "beside its text" if "input_ids" in made else "and its text as labels"
        tokens = f", {layout.tokens:,} token{'s' * (layout.tokens > 1)}," if layout.tokens else ""
        if any(key in made for key in PIXELS):
            width = width_of(self._model.config, made)
            return f"each sequence has an image of {width:,} × {width:,} pixels{tokens} {beside}"
        (sound,) = (made[key] for key in SOUND if key in made)
        return f"each sequence has audio of {max(sound.shape[1:]):,} frames{tokens} {beside}"
