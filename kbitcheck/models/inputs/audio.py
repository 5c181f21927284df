"""Audio that a model may read: within a text or beside it, as mel bins or as a wave."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from kbitcheck.models.inputs.media import Medium
from kbitcheck.models.inputs.text import IGNORED, Batch, Shape, Tokens, draw, fit

FRAMES, SAMPLES = 64, 1600
MASKS = ("input_features_mask", "feature_attention_mask", "padding_mask")
AUDIO_TOKENS = ("audio_token_id", "audio_token_index")
ENCODERS = ("encoder_config", "audio_config", "encoder", "asr_config")
BINS = (
    "input_size", "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "feature_projection_input_dim",
)  # fmt: skip

Sides = Callable[[Any], tuple[int, ...]]


def batches_with_audio(model: PreTrainedModel, shape: Shape) -> Iterator[Callable[[Any], Batch]]:
    """Functions that make a batch with audio for a copy of ``model``, to be tried in this order."""
    for medium in audio_in_text(model):
        yield partial(medium.batch, **shape)
    for make in audio_beside_text(model):
        yield partial(make, **shape)


def audio_in_text(model: PreTrainedModel) -> Iterator[Medium]:
    """Layouts of audio that tokens of a text stand for."""
    accepted = inspect.signature(type(model).forward).parameters
    encode = _encoder(model) if "input_ids" in accepted else None
    taken = inspect.signature(encode).parameters if encode else {}

    def read(key: str, sides: Sides, time: int, read_by: Any, rows: int, seed: int) -> Batch:
        numbers = Tokens(read_by, seed).features(rows, *sides(_config(read_by.config)))
        whole = torch.ones(rows, numbers.shape[1 + time], dtype=torch.int64)
        return {key: numbers, **{mask: whole for mask in MASKS if mask in taken}}

    for key, sides, time in LAYOUTS:
        if key in taken:
            yield Medium(partial(read, key, sides, time), _encoder, _spelled_out)


def audio_beside_text(model: PreTrainedModel) -> Iterator[Callable[..., Batch]]:
    """Functions of the model, ``batch``, ``seq_len`` and ``seed`` that make audio for an encoder and text as labels; they run nothing."""
    accepted = inspect.signature(type(model).forward).parameters
    for key, sides, _ in LAYOUTS:
        if key in accepted:
            yield partial(_audio_beside_text, key=key, sides=sides)


def _encoder(model: Any) -> Callable[..., Any] | None:
    """The method that computes features of audio to put into a text, or None."""
    parts = [part for part in (getattr(model, "model", None), model) if part is not None]
    method = next((part.get_audio_features for part in parts if hasattr(part, "get_audio_features")), None)
    tower = next((part.audio_tower for part in parts if hasattr(part, "audio_tower")), None)
    if method is not None or tower is None:
        return method

    def encoded(input_features: Any, feature_attention_mask: Any) -> Any:
        return tower(input_features)

    return encoded


def _spelled_out(model: Any, count: int, batch: int, seq_len: int, seed: int) -> Batch:
    """A text with ``count`` tokens for the audio in each row.

    A model without such a token adds features and embeddings up, so that its text is as long as its audio.
    """
    token = next((t for name in AUDIO_TOKENS if isinstance(t := getattr(model.config, name, None), int)), None)
    text = draw(model, batch=batch, seq_len=count + (seq_len if token is not None else 0), seed=seed, images=False)
    if token is not None:
        text["input_ids"][:, 1 : 1 + count] = token
        text["labels"][:, 1 : 1 + count] = IGNORED
    return text


def _audio_beside_text(model: Any, *, key: str, sides: Sides, batch: int, seq_len: int, seed: int) -> Batch:
    tokens = Tokens(model, seed)
    labels = tokens.labels(batch, seq_len)
    return fit({"labels": labels, key: tokens.features(batch, *sides(_config(model.config)))}, model)


def _config(config: Any) -> Any:
    """The configuration of the audio encoder."""
    part = next((part for name in ENCODERS if (part := getattr(config, name, None)) is not None), None)
    return config if part is None else _config(part)


def _bins(config: Any) -> int:
    return next((v for name in BINS if isinstance(v := getattr(config, name, None), int)), 80)


def _frames(config: Any) -> int:
    positions = getattr(config, "max_source_positions", None)
    windows = 2 * getattr(config, "n_window", FRAMES // 2)  # some read whole windows
    return 2 * positions if isinstance(positions, int) else windows


# How a model may name its audio, with the sides of a row and which of them is time.
LAYOUTS: tuple[tuple[str, Sides, int], ...] = (
    ("input_features", lambda config: (_bins(config), _frames(config)), 1),
    ("input_features", lambda config: (FRAMES, _bins(config)), 0),
    ("input_values", lambda _: (SAMPLES,), 0),
    ("input_values", lambda _: (1, SAMPLES), 1),
)
