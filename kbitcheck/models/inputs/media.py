"""Images and audio that tokens of a text stand for: as many as the model itself computes features."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kbitcheck.models.inputs.text import Batch, fit


class Medium(NamedTuple):
    """One layout of a medium: what a model reads (of it, rows and a seed), its method that computes features of that, and the
    text (of the model, features in a row, rows, tokens beside them, and a seed).
    """

    read: Callable[[Any, int, int], Batch]
    encoder: Callable[[Any], Callable[..., Any] | None]
    text: Callable[[Any, int, int, int, int], Batch]

    def features(self, model: Any, batch: int, seed: int) -> Any:
        """What the model computes of a medium of ``batch`` rows."""
        encode = self.encoder(model)
        assert encode is not None
        return encode(**fit(self.read(model, batch, seed), model))

    def around(self, model: Any, count: int, *, batch: int, seq_len: int, seed: int) -> Batch:
        """Rows of ``seq_len`` tokens, and ``count`` more for the medium in each."""
        return fit({**self.text(model, count, batch, seq_len, seed), **self.read(model, batch, seed)}, model)

    def batch(self, model: Any, *, batch: int, seq_len: int, seed: int) -> Batch:
        """The same, of as many as the model computes when it runs."""
        with torch.no_grad():
            count = counted(self.features(model.eval(), batch, seed)) // batch
        return self.around(model, count, batch=batch, seq_len=seq_len, seed=seed)


def counted(features: Any) -> int:
    """How many features there are."""
    return sum(part.numel() // part.shape[-1] for part in _parts(features))


def _parts(features: Any) -> Sequence[Tensor]:
    """The features, from any form of output: one tensor, or one for each image."""
    states = getattr(features, "pooler_output", None)
    if states is None and (layers := getattr(features, "deepstack_features", None)):
        states = layers[0][1]  # as many in each layer that reads them
    if states is None:
        states = getattr(features, "last_hidden_state", features)
    return states if isinstance(states, list | tuple) else [states]
