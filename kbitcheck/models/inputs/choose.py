"""The first of several layouts of a batch that an architecture really runs on."""

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kbitcheck.core.errors import UsageError
from kbitcheck.models.inputs.audio import batches_with_audio
from kbitcheck.models.inputs.images import PIXELS, batches_with_images
from kbitcheck.models.inputs.text import Batch, Shape, Tokens, draw, fit
from kbitcheck.models.load import quiet

log = logging.getLogger("kbitcheck")

KINDS = {"input_ids": "text", "input_features": "audio", "input_values": "audio", **dict.fromkeys(PIXELS, "images")}


def training_batch(model: PreTrainedModel, **shape: Any) -> Batch:
    """A batch of the first layout with images or audio that ``model`` computes a loss from, or what ``draw`` makes.

    A model that runs on text alone gets that only where ``draw`` can make nothing: if it broke on images, it is to be judged
    on images.
    """
    accepted = inspect.signature(type(model).forward).parameters
    if not (KINDS.keys() - {"input_ids"}) & accepted.keys() or model.device.type == "meta":
        return draw(model, **shape)
    fitting: Batch = {}
    try:
        with quiet():
            fitting = first_fitting(model, images=True, audio=True, **shape)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:  # the model's own code: it may raise anything
        log.debug("no layout of a batch fits %s", type(model).__name__, exc_info=True)
    if kinds(fitting) not in ("", "text"):
        return fitting
    try:
        return draw(model, **shape)
    except UsageError:
        if not fitting:
            raise
        return fitting


def first_fitting(model: PreTrainedModel, *, images: bool, audio: bool, **shape: Any) -> Batch:
    """A batch that a copy of ``model`` computes a loss from; text alone is the last resort. ``model`` is not run.

    ``shape`` holds ``batch``, ``seq_len`` and ``seed``. A layout whose images change no logits is passed over, since the
    model does not read them. If no layout fits, the error is that of the first one.
    """
    failed: Exception | None = None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    for make in _layouts(model, shape, images=images, audio=audio):
        try:
            with torch.random.fork_rng(devices):
                # Some layouts run the model, to count an image's tokens: on a copy, which is not used again.
                made = make(copy.deepcopy(model))
                with torch.no_grad():
                    loss = copy.deepcopy(model).train()(**made).loss
                if loss is not None and bool(torch.isfinite(loss)) and _reads_images(model, made):
                    return made
        except (torch.OutOfMemoryError, MemoryError):  # no property of the model
            raise
        except Exception as error:
            failed = failed or error.with_traceback(None)  # its frames hold the copy
    raise failed or ValueError(f"{type(model).__name__} computes no finite loss")


def first_running(model: PreTrainedModel, **shape: Any) -> Batch | None:
    """A batch with images or audio that a copy of ``model`` runs on, whether it computes a loss of it or not; None if no layout fits."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    for make in _layouts(model, shape, images=True, audio=True):
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), quiet():
                made = make(copy.deepcopy(model))
                copy.deepcopy(model).train()(**made)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # the model's own code: it may raise anything
            log.debug("a layout of a batch does not fit %s", type(model).__name__, exc_info=True)
        else:
            return made
    return None


def _reads_images(model: PreTrainedModel, made: Batch) -> bool:
    """Whether other images give other logits; True for a batch without images."""
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
    """The kinds of input in a batch: ``text``, ``text, images``, ``audio``."""
    return ", ".join(dict.fromkeys(kind for key, kind in KINDS.items() if key in batch))


def _layouts(model: PreTrainedModel, shape: Shape, *, images: bool, audio: bool) -> Iterator[Callable[[Any], Batch]]:
    if images:
        yield from batches_with_images(model, shape)
    if audio:
        yield from batches_with_audio(model, shape)
    yield lambda m: draw(m, **shape, images=False)
    yield lambda m: draw(m, **shape, images=False, labels=shape["seq_len"])
    if "decoder_input_ids" in inspect.signature(type(model).forward).parameters:
        yield lambda m: _with_decoder_inputs(m, **shape)
    if hasattr(model.config, "num_codebooks"):
        yield lambda m: _with_codebooks(m, **shape)


def _with_decoder_inputs(model: Any, *, batch: int, seq_len: int, seed: int) -> Batch:
    """Text for an encoder-decoder that does not derive its decoder's inputs from the labels."""
    text = draw(model, batch=batch, seq_len=seq_len, seed=seed, images=False, labels=seq_len)
    return fit({**text, "decoder_input_ids": Tokens(model, seed + 1).ids(batch, seq_len)}, model)


def _with_codebooks(model: Any, *, batch: int, seq_len: int, seed: int) -> Batch:
    """At each position a token of text and one of each codebook of the audio; the labels are text."""
    made = draw(model, batch=batch, seq_len=seq_len, seed=seed, images=False)
    codes = [Tokens(model, seed + 1 + book).ids(batch, seq_len) for book in range(model.config.num_codebooks)]
    return {**made, "input_ids": torch.stack([made["input_ids"], *codes], dim=-1)}
