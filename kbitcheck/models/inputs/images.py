"""Pictures that a model may read: what a text holds in their place, and how their pixels lie."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kbitcheck.models.inputs.text import IGNORED, Batch, Tokens, draw, fit

PIXELS = ("pixel_values", "flattened_patches")
READERS = ("get_image_features", "get_video_features")
IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id", "video_token_index")
MARKS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


def forms_of_pictures(model: PreTrainedModel, shape: Mapping[str, Any]) -> Iterator[Callable[[Any], Batch]]:
    """Batches with pictures to try, each made when called on a copy of ``model``; ``shape`` is batch, length and seed."""
    accepted = inspect.signature(model.forward).parameters
    if "pixel_values" in accepted:
        yield lambda m: draw(m, **shape)
    for layout in WITHIN_TEXT:
        if _reader(model) and "input_ids" in accepted:
            yield lambda m, layout=layout: _with_pictures(m, layout, **shape)  # type: ignore[misc]
    for layout in BESIDE_TEXT:
        for labels in (None, shape["seq_len"]):
            yield lambda m, layout=layout, labels=labels: _with_pictures_beside(m, layout, labels, **shape)  # type: ignore[misc]


# What text holds in their place


def _with_pictures(
    model: Any, layout: Callable[[Any, Tokens, int], Batch], *, batch: int, seq_len: int, seed: int
) -> Batch:
    """Text in which as many tokens stand for the picture as the model itself makes of it."""
    tokens, accepted = Tokens(model, seed), inspect.signature(model.forward).parameters
    read = _taken(layout(model.config, tokens, batch), accepted)
    with torch.no_grad():
        features = _reader(model.eval())(**fit(read, model))  # type: ignore[misc]
    count = sum(part.numel() // part.shape[-1] for part in _parts(features)) // batch
    made = draw(model, batch=batch, seq_len=seq_len + count, seed=seed, images=False)
    made["input_ids"][:, 1 : 1 + count] = _image_token(model.config)
    if made["labels"].shape == made["input_ids"].shape:
        made["labels"][:, 1 : 1 + count] = IGNORED
    marks = torch.zeros_like(made["input_ids"])
    marks[:, 1 : 1 + count] = 1
    made |= {key: marks for key in MARKS if key in accepted}
    return fit({**made, **read}, model)


def _parts(features: Any) -> Sequence[Tensor]:
    """What pictures became, whatever holds it: one tensor, or one for each picture."""
    states = getattr(features, "pooler_output", None)
    if states is None and (layers := getattr(features, "deepstack_features", None)):
        states = layers[0][1]  # for each layer that reads them; the same number in all
    if states is None:
        states = getattr(features, "last_hidden_state", features)
    return states if isinstance(states, list | tuple) else [states]


def _reader(model: Any) -> Callable[..., Any] | None:
    """What turns pictures, or the frames of a film, into features: of the model, or of what its head sits on."""
    places = [(part, name) for name in READERS for part in (model, model.base_model)]
    return next((getattr(part, name) for part, name in places if hasattr(part, name)), None)


def _image_token(config: Any) -> int:
    for name in IMAGE_TOKENS:
        if isinstance(token := getattr(config, name, None), int):
            return token
    return int(config.vocabulary_map["<image>"])


def _with_pictures_beside(
    model: Any,
    layout: Callable[[Any, Tokens, int], Batch],
    length: int | None,
    *,
    batch: int,
    seq_len: int,
    seed: int,
) -> Batch:
    """A picture for each row, in no place of its text: what cross-attention reads, or what is put before the text."""
    accepted, tokens = inspect.signature(model.forward).parameters, Tokens(model, seed)
    read = _taken(layout(getattr(model.config, "encoder", model.config), tokens, batch), accepted)
    if "input_ids" in accepted:
        made = draw(model, batch=batch, seq_len=seq_len, seed=seed, images=False, labels=length)
        places = _places(model.config, tokens, batch, seq_len)
        read |= {key: value for key, value in places.items() if key in accepted}
    else:
        made = {"labels": tokens.ids(batch, seq_len).where(tokens.mask(batch, seq_len).bool(), IGNORED)}
    return fit({**made, **read}, model)


def _taken(read: Batch, accepted: Container[str]) -> Batch:
    """What the model takes of a layout.

    Raises:
        ValueError: it does not take the pixels.
    """
    taken = {key: value for key, value in read.items() if key in accepted}
    if not any(key in taken for key in PIXELS):
        raise ValueError(f"pictures do not come as {', '.join(PIXELS)}")
    return taken


def _places(config: Any, tokens: Tokens, batch: int, seq_len: int) -> Batch:
    """For each token of a text where it is on its page, and what it may see of one picture."""
    made = {
        "bbox": tokens.features(batch, seq_len, 4).abs() / 2,
        "image_attention_mask": torch.ones(batch, seq_len, 1, dtype=torch.int64),
        "cross_attention_mask": torch.ones(batch, seq_len, 1, _tiles_of(config), dtype=torch.int64),
    }
    if queries := getattr(config, "latent_query_num", 0):
        marks = torch.zeros(batch, seq_len, dtype=torch.int64)
        marks[:, 1 : 1 + queries] = 1
        made["image_embeds_position_mask"] = marks
    return made


# How their pixels lie


def _vision(config: Any) -> Any:
    """The configuration that tells the sizes of pictures."""
    parts = (config, getattr(config, "encoder", None))
    return next((v for c in parts if (v := getattr(c, "vision_config", None)) is not None), config)


def _number(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _size(config: Any) -> tuple[int, int]:
    """Channels and width of a picture of a few patches."""
    vision = _vision(config)
    size, patch = getattr(vision, "image_size", None), _number(getattr(vision, "patch_size", 8))
    return _channels(vision), _number(size or 4 * patch)


def _channels(vision: Any) -> int:
    return int(getattr(vision, "num_channels", getattr(vision, "in_channels", 3)))


def _tiles_of(config: Any) -> int:
    return int(getattr(_vision(config), "max_num_tiles", 1))


def _plain(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Pictures as they are, with their sizes, and what else some models want to see of them."""
    channels, size = _size(config)
    made = {
        "pixel_values": tokens.features(batch, channels, size, size),
        "image_sizes": torch.tensor([[size, size]] * batch),
        "qformer_input_ids": tokens.ids(batch, 8),
    }
    if (finer := getattr(config, "high_res_vision_config", None)) is not None:
        made["high_res_pixel_values"] = tokens.features(batch, channels, finer.image_size, finer.image_size)
    return made


def _nested(config: Any, tokens: Tokens, batch: int) -> Batch:
    """A list of pictures for each row, of one."""
    made = _plain(config, tokens, batch)
    return {**made, "pixel_values": made["pixel_values"].unsqueeze(1)}


def _tiles(config: Any, tokens: Tokens, batch: int) -> Batch:
    """A list of tiles for each row, of one, and which of them are no padding."""
    return {**_nested(config, tokens, batch), "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool)}


def _tiled(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Of each picture the whole and one tile, with its size, as LLaVA-NeXT reads them."""
    made = _plain(config, tokens, 2 * batch)
    pixels = made["pixel_values"]
    return {"pixel_values": pixels.view(batch, 2, *pixels.shape[1:]), "image_sizes": made["image_sizes"][:batch]}


def _tiles_in_one(config: Any, tokens: Tokens, batch: int) -> Batch:
    """For each row a list of pictures, of one, of as many tiles as there can be, of which one is seen (Llama 3.2)."""
    (channels, size), tiles = _size(config), _tiles_of(config)
    seen = (torch.arange(tiles) == 0).long().expand(batch, 1, tiles)
    return {
        "pixel_values": tokens.features(batch, 1, tiles, channels, size, size),
        "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.int64),
        "aspect_ratio_mask": seen,
    }


def _grid(config: Any, batch: int) -> tuple[int, int, Batch]:
    """Patches along a side, numbers in a patch, and the keyword arguments that say so to models that read patches."""
    vision = _vision(config)
    merges = (
        getattr(part, name, None)
        for part in (vision, config)
        for name in (
            "spatial_merge_size",
            "merge_size",
            "merge_kernel_size",
            "downsample_factor",
            "pooling_kernel_size",
        )
    )
    merge = _number(next((m for m in merges if m is not None), 1))
    frames = getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1))
    side = 2 * merge
    patch = getattr(vision, "model_patch_size", _number(vision.patch_size))
    return side, _channels(vision) * patch**2 * _number(frames), {
        "image_grid_thw": torch.tensor([[1, side, side]] * batch),
        "image_grid_hw": torch.tensor([[side, side]] * batch),
        "target_sizes": torch.tensor([[side, side]] * batch),
        "image_merge_sizes": torch.tensor([merge] * batch),
    }  # fmt: skip


def _patches(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Patches in a row, with the grid that they come from, as Qwen-VL and its kin read pictures."""
    side, width, sizes = _grid(config, batch)
    return {"pixel_values": tokens.features(batch * side * side, width), **sizes}


def _squares(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Patches in a row that still are pictures."""
    vision, (side, _, sizes) = _vision(config), _grid(config, batch)
    patch = _number(vision.patch_size)
    return {"pixel_values": tokens.features(batch * side * side, _channels(vision), patch, patch), **sizes}


def _strip(config: Any, tokens: Tokens, batch: int) -> Batch:
    """All patches of all pictures beside each other in one low picture, as MiniCPM-V reads them."""
    made = _squares(config, tokens, batch)
    return {**made, "pixel_values": torch.cat(list(made["pixel_values"]), dim=-1).unsqueeze(0)}


def _blocks(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Squares of the patches that become one token, colours last, with the grid of these squares."""
    vision, (side, _, _) = _vision(config), _grid(config, batch)
    width = side // 2 * _number(vision.patch_size)
    pixels = tokens.features(batch * 4, width, width, _channels(vision))
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]] * batch)}


def _cubes(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Patches in a row, each with its moments, colours last."""
    vision = _vision(config)
    moments, patch = getattr(vision, "temporal_patch_size", 1), _number(vision.patch_size)
    return {"pixel_values": tokens.features(batch * 4, moments, patch, patch, _channels(vision))}


def _rows(config: Any, tokens: Tokens, batch: int) -> Batch:
    """For each picture its patches in a row, with the place of each, padded to one length: here none is."""
    side, width, _ = _grid(config, batch)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return {
        "pixel_values": tokens.features(batch, side * side, width),
        "image_position_ids": places.expand(batch, -1, -1),
        "spatial_shapes": torch.tensor([[side, side]] * batch),
        "pixel_attention_mask": torch.ones(batch, side * side, dtype=torch.int64),
        # Two neighbours become one token.
        "image_token_pooling": torch.arange(batch * side * side).view(-1, 2),
        "image_grids": torch.tensor([[side, side // 2, 0, 0]] * batch),
    }


def _flattened(config: Any, tokens: Tokens, batch: int) -> Batch:
    """For each picture its patches in a row, each with its row and column before its numbers, as Pix2Struct reads them."""
    vision = _vision(config)
    width = getattr(vision, "patch_embed_hidden_size", None) or _channels(vision) * _number(vision.patch_size) ** 2
    places = torch.cartesian_prod(torch.arange(1.0, 3.0), torch.arange(1.0, 3.0)).expand(batch, -1, -1)
    return {"flattened_patches": torch.cat([places, tokens.features(batch, 4, width)], dim=-1)}


# The first that fits is taken: a strip before squares, of which MiniCPM-V would read the first alone.
WITHIN_TEXT = (
    _patches, _plain, _nested, _tiles, _tiled, _strip, _squares, _blocks, _cubes, _rows,
)  # fmt: skip
BESIDE_TEXT = (_plain, _nested, _tiles_in_one, _flattened)
