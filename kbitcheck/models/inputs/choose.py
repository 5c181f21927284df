"""What an architecture can be fed: the first of several forms of batch that it really runs on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kbitcheck.models.inputs.audio import forms_of_sounds
from kbitcheck.models.inputs.images import PIXELS, forms_of_pictures
from kbitcheck.models.inputs.text import Batch, Tokens, draw, fit


def first_fitting(
    model: PreTrainedModel, *, batch: int, seq_len: int, seed: int, pictures: bool, sounds: bool
) -> Batch:
    """A batch that a copy of ``model`` computes a loss from; text alone is the last resort. ``model`` is not run.

    A form whose pictures change nothing is passed over: they are read nowhere.

    Raises:
        Exception: none of the forms fits; this is what the first one raised.
    """
    failed: Exception | None = None
    for make in _forms(model, batch, seq_len, seed, pictures, sounds):
        try:
            # Drawing may ask the model how many tokens a picture makes: of a copy, and what ran once is not used again.
            made = make(copy.deepcopy(model))
            with torch.no_grad():
                loss = copy.deepcopy(model).train()(**made).loss
            if loss is not None and bool(torch.isfinite(loss)) and _sees(model, made):
                return made
        except Exception as error:
            failed = failed or error
    raise failed or ValueError(f"{type(model).__name__} computes no finite loss")


def _sees(model: PreTrainedModel, made: Batch) -> bool:
    """Whether other pictures would give other logits; True where there are none."""
    pixels = [key for key in made if key in PIXELS]
    if not pixels:
        return True
    others = {key: made[key].clone() for key in pixels}
    for other in others.values():
        other[..., 2:].neg_()  # the first two may be a patch's row and column
    with torch.no_grad():
        one, two = (copy.deepcopy(model).eval()(**batch).logits for batch in (made, {**made, **others}))
    return not torch.equal(one, two)


def kinds(batch: Mapping[str, Tensor]) -> str:
    """What a batch holds, in words: ``text``, ``text, pictures``, ``sounds``."""
    named = {"input_ids": "text", "input_features": "sounds", "input_values": "sounds"}
    named |= dict.fromkeys(PIXELS, "pictures")
    return ", ".join(dict.fromkeys(word for key, word in named.items() if key in batch))


def _forms(
    model: PreTrainedModel, batch: int, seq_len: int, seed: int, pictures: bool, sounds: bool
) -> Iterator[Callable[[Any], Batch]]:
    accepted = inspect.signature(model.forward).parameters
    shape: dict[str, Any] = {"batch": batch, "seq_len": seq_len, "seed": seed}
    if pictures:
        yield from forms_of_pictures(model, shape)
    if sounds:
        yield from forms_of_sounds(model, shape)
    yield lambda m: draw(m, **shape, images=False)
    yield lambda m: draw(m, **shape, images=False, labels=seq_len)
    if "decoder_input_ids" in accepted:
        yield lambda m: _with_decoder_inputs(m, **shape)
    if hasattr(model.config, "num_codebooks"):
        yield lambda m: _with_codebooks(m, **shape)


def _with_decoder_inputs(model: Any, *, batch: int, seq_len: int, seed: int) -> Batch:
    """For an encoder-decoder that does not make its decoder's inputs from the labels."""
    ids = Tokens(model, seed + 1).ids(batch, seq_len)
    return fit(
        {
            **draw(model, batch=batch, seq_len=seq_len, seed=seed, images=False, labels=seq_len),
            "decoder_input_ids": ids,
        },
        model,
    )


def _with_codebooks(model: Any, *, batch: int, seq_len: int, seed: int) -> Batch:
    """At each place a token of text and one of each codebook of the sound; the labels are text."""
    made = draw(model, batch=batch, seq_len=seq_len, seed=seed, images=False)
    heard = [Tokens(model, seed + 1 + book).ids(batch, seq_len) for book in range(model.config.num_codebooks)]
    return {**made, "input_ids": torch.stack([made["input_ids"], *heard], dim=-1)}
