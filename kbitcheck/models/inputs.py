"""What an architecture can be fed: the first of several forms of batch that it really runs on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kbitcheck.models.batch import IGNORED, Tokens, draw, fit

Batch = dict[str, Tensor]
FRAMES, SAMPLES = 64, 1600


def first_fitting(
    model: PreTrainedModel, *, batch: int, seq_len: int, seed: int, pictures: bool, sounds: bool
) -> Batch:
    """A batch that a copy of ``model`` computes a loss from; text alone is the last resort. ``model`` is not run.

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
            if loss is not None and bool(torch.isfinite(loss)):
                return made
        except Exception as error:
            failed = failed or error
    raise failed or ValueError(f"{type(model).__name__} computes no finite loss")


def kinds(batch: Mapping[str, Tensor]) -> str:
    """What a batch holds, in words: ``text``, ``text, pictures``, ``sounds``."""
    named = {"input_ids": "text", "pixel_values": "pictures", "input_features": "sounds", "input_values": "sounds"}
    return ", ".join(dict.fromkeys(word for key, word in named.items() if key in batch))


def _forms(
    model: PreTrainedModel, batch: int, seq_len: int, seed: int, pictures: bool, sounds: bool
) -> Iterator[Callable[[Any], Batch]]:
    accepted = inspect.signature(model.forward).parameters
    shape: dict[str, Any] = {"batch": batch, "seq_len": seq_len, "seed": seed}
    if pictures:
        yield lambda m: draw(m, **shape)
        if hasattr(model, "get_image_features") and "input_ids" in accepted:
            for pixels in (_patches, _plain, _sized, _nested, _tiled):
                yield lambda m, pixels=pixels: _with_pictures(m, pixels, **shape)  # type: ignore[misc]
        if "pixel_values" in accepted:
            yield lambda m: _with_pictures_beside(m, **shape)
    if sounds:
        yield from _forms_of_sounds(model, shape)
    yield lambda m: draw(m, **shape, images=False)
    yield lambda m: draw(m, **shape, images=False, labels=seq_len)
    if "decoder_input_ids" in accepted:
        yield lambda m: _with_decoder_inputs(m, **shape)
    if hasattr(model.config, "num_codebooks"):
        yield lambda m: _with_codebooks(m, **shape)


# Pictures


def _with_pictures(
    model: Any, pixels: Callable[[Any, Tokens, int], Batch], *, batch: int, seq_len: int, seed: int
) -> Batch:
    """Text in which as many tokens stand for the picture as the model itself makes of it."""
    tokens = Tokens(model, seed)
    accepted = inspect.signature(model.forward).parameters
    read = pixels(model.config, tokens, batch)
    with torch.no_grad():
        features = model.eval().get_image_features(**fit(read, model))
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, list | tuple) else [features]
    count = sum(part.numel() // part.shape[-1] for part in parts) // batch
    image = next(
        v for k in ("image_token_id", "image_token_index") if (v := getattr(model.config, k, None)) is not None
    )
    made = draw(model, batch=batch, seq_len=seq_len + count, seed=seed, images=False)
    made["input_ids"][:, 1 : 1 + count] = image
    if made["labels"].shape == made["input_ids"].shape:
        made["labels"][:, 1 : 1 + count] = IGNORED
    marks = (made["input_ids"] == image).long()
    made |= {key: marks for key in ("token_type_ids", "mm_token_type_ids") if key in accepted}
    return fit({**made, **read}, model)


def _with_pictures_beside(model: Any, *, batch: int, seq_len: int, seed: int) -> Batch:
    """A picture for each row, in no place of its text: what cross-attention reads, or what is put before the text."""
    read = _plain(getattr(model.config, "encoder", model.config), Tokens(model, seed), batch)
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" in accepted:
        return fit({**draw(model, batch=batch, seq_len=seq_len, seed=seed, images=False), **read}, model)
    tokens = Tokens(model, seed)
    labels = tokens.ids(batch, seq_len).where(tokens.mask(batch, seq_len).bool(), IGNORED)
    return fit({**read, "labels": labels}, model)


def _size(config: Any) -> tuple[int, int]:
    """Channels and width of a picture of a few patches."""
    vision = getattr(config, "vision_config", config)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", 8)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    size = size[0] if isinstance(size, list | tuple) else size
    channels = getattr(vision, "num_channels", getattr(vision, "in_channels", 3))
    return int(channels), int(size or 4 * patch)


def _plain(config: Any, tokens: Tokens, batch: int) -> Batch:
    channels, size = _size(config)
    return {"pixel_values": tokens.features(batch, channels, size, size)}


def _sized(config: Any, tokens: Tokens, batch: int) -> Batch:
    made = _plain(config, tokens, batch)
    return {**made, "image_sizes": torch.tensor([made["pixel_values"].shape[-2:]] * batch)}


def _nested(config: Any, tokens: Tokens, batch: int) -> Batch:
    """A list of pictures for each row, of one."""
    return {"pixel_values": _plain(config, tokens, batch)["pixel_values"].unsqueeze(1)}


def _tiled(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Of each picture the whole and one tile, with its size, as LLaVA-NeXT reads them."""
    made = _sized(config, tokens, 2 * batch)
    pixels = made["pixel_values"]
    return {"pixel_values": pixels.view(batch, 2, *pixels.shape[1:]), "image_sizes": made["image_sizes"][:batch]}


def _patches(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Patches in a row, with the grid that they come from, as Qwen-VL and its kin read pictures."""
    vision = config.vision_config
    channels, _ = _size(config)
    side = 2 * getattr(vision, "spatial_merge_size", getattr(config, "spatial_merge_size", 1))
    width = channels * vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1)
    return {
        "pixel_values": tokens.features(batch * side * side, width),
        "image_grid_thw": torch.tensor([[1, side, side]] * batch),
    }


# Sounds


Sound = Callable[[Any, Tokens, int], tuple[Tensor, int]]


def _forms_of_sounds(model: PreTrainedModel, shape: Mapping[str, Any]) -> Iterator[Callable[[Any], Batch]]:
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


# Text in other forms


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
