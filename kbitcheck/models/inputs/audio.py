"""Sounds that a model may hear: within a text or beside it, as mel bins or as a wave."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kbitcheck.models.inputs.text import IGNORED, Batch, Tokens, draw, fit

FRAMES, SAMPLES = 64, 1600

Sound = Callable[[Any, Tokens, int], tuple[Tensor, int]]


def forms_of_sounds(model: PreTrainedModel, shape: Mapping[str, Any]) -> Iterator[Callable[[Any], Batch]]:
    """Batches with sounds to try, each made when called on a copy of ``model``; ``shape`` is batch, length and seed."""
    accepted = inspect.signature(model.forward).parameters
    hears = _hears(model)
    asked = inspect.signature(hears.get_audio_features).parameters if hears and "input_ids" in accepted else {}
    for put, taken in ((_with_sounds_in_text, asked), (_with_sounds_beside, accepted)):
        for key, sound in SOUNDS:
            if key in taken:
                yield lambda m, put=put, key=key, sound=sound: put(m, key, sound, **shape)  # type: ignore[misc]


def _hears(model: Any) -> Any:
    """The part that makes features of sounds to put into a text, or None."""
    return next((m for m in (getattr(model, "model", None), model) if hasattr(m, "get_audio_features")), None)


def _with_sounds_in_text(model: Any, key: str, sound: Sound, *, batch: int, seq_len: int, seed: int) -> Batch:
    """Text in which as many tokens stand for the sound as the model itself makes of it.

    A model without such a token adds the two up: its text is as long as its sound.
    """
    hears = _hears(model)
    asked = inspect.signature(hears.get_audio_features).parameters
    heard, length = sound(_encoder(model.config), Tokens(model, seed), batch)
    whole = torch.ones(batch, length, dtype=torch.int64)
    read = fit(
        {key: heard, **{mask: whole for mask in ("input_features_mask", "padding_mask") if mask in asked}}, model
    )
    with torch.no_grad():
        features = hears.eval().get_audio_features(**read)
    features = getattr(features, "pooler_output", features)
    count = features.numel() // features.shape[-1] // batch
    audio = getattr(model.config, "audio_token_id", None)
    made = draw(model, batch=batch, seq_len=count + (seq_len if audio is not None else 0), seed=seed, images=False)
    if audio is not None:
        made["input_ids"][:, 1 : 1 + count] = audio
        made["labels"][:, 1 : 1 + count] = IGNORED
    return {**made, **read}


def _with_sounds_beside(model: Any, key: str, sound: Sound, *, batch: int, seq_len: int, seed: int) -> Batch:
    """Sounds that an encoder reads; the labels are text."""
    tokens = Tokens(model, seed)
    heard, _ = sound(_encoder(model.config), tokens, batch)
    labels = tokens.ids(batch, seq_len).where(tokens.mask(batch, seq_len).bool(), IGNORED)
    return fit({key: heard, "labels": labels}, model)


def _encoder(config: Any) -> Any:
    """The configuration of what hears."""
    parts = (getattr(config, name, None) for name in ("encoder_config", "audio_config", "encoder", "asr_config"))
    part = next((part for part in parts if part is not None), None)
    return config if part is None else _encoder(part)


def _bins(config: Any) -> int:
    names = (
        "input_size",
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_size",
        "input_dim",
        "feature_projection_input_dim",
    )
    return next((v for name in names if isinstance(v := getattr(config, name, None), int)), 80)


def _bins_by_frames(config: Any, tokens: Tokens, batch: int) -> tuple[Tensor, int]:
    positions = getattr(config, "max_source_positions", None)
    windows = 2 * getattr(config, "n_window", FRAMES // 2)  # some read whole windows
    frames = 2 * positions if isinstance(positions, int) else windows
    return tokens.features(batch, _bins(config), frames), frames


def _frames_by_bins(config: Any, tokens: Tokens, batch: int) -> tuple[Tensor, int]:
    return tokens.features(batch, FRAMES, _bins(config)), FRAMES


def _wave(config: Any, tokens: Tokens, batch: int) -> tuple[Tensor, int]:
    return tokens.features(batch, SAMPLES), SAMPLES


def _wave_of_a_channel(config: Any, tokens: Tokens, batch: int) -> tuple[Tensor, int]:
    return tokens.features(batch, 1, SAMPLES), SAMPLES


SOUNDS: tuple[tuple[str, Sound], ...] = (
    ("input_features", _bins_by_frames),
    ("input_features", _frames_by_bins),
    ("input_values", _wave),
    ("input_values", _wave_of_a_channel),
)
