"""Images that a model may read: the tokens that stand for them in a text, and the layout of their pixels."""

import inspect
import math
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kbitcheck.models.inputs.media import Medium
from kbitcheck.models.inputs.text import IGNORED, Batch, Shape, Tokens, draw, fit

PIXELS = ("pixel_values", "flattened_patches")
ENCODERS = ("get_image_features", "get_video_features")
IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id", "video_token_index")
MARKS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
SIDES = ("image_grid_thw", "image_grid_hw", "target_sizes")
MERGES = ("spatial_merge_size", "merge_size", "merge_kernel_size", "downsample_factor", "pooling_kernel_size")

Layout = Callable[[Any, Tokens, int], Batch]


def batches_with_images(model: PreTrainedModel, shape: Shape) -> Iterator[Callable[[Any], Batch]]:
    """Functions that make a batch with images for a copy of ``model``, to be tried in this order."""
    if "pixel_values" in inspect.signature(type(model).forward).parameters:
        yield lambda m: draw(m, **shape)
    for medium in images_in_text(model):
        yield partial(medium.batch, **shape)
    for make in images_beside_text(model):
        yield partial(make, **shape)


def images_in_text(model: PreTrainedModel, width: int | None = None) -> Iterator[Medium]:
    """Layouts of images that tokens of a text stand for; ``width`` is in pixels, where the model's configuration states none."""
    accepted = inspect.signature(type(model).forward).parameters
    if _encoder(model) is None or "input_ids" not in accepted:
        return

    def read(layout: Layout, read_by: Any, rows: int, seed: int) -> Batch:
        return _accepted(layout(read_by.config, Tokens(read_by, seed, width=width), rows), accepted)

    for layout in WITHIN_TEXT if width is None else (WITHIN_TEXT[0], _whole, *WITHIN_TEXT[1:]):
        yield Medium(partial(read, layout), _encoder, _spelled_out)


def images_beside_text(model: PreTrainedModel, width: int | None = None) -> Iterator[Callable[..., Batch]]:
    """Functions of the model, ``batch``, ``seq_len`` and ``seed`` that make an image and a text without tokens for it."""
    if any(key in inspect.signature(type(model).forward).parameters for key in PIXELS):
        for layout in BESIDE_TEXT:
            for as_long in (False, True):
                yield partial(_images_beside_text, layout=layout, as_long=as_long, width=width)


def _spelled_out(model: Any, count: int, batch: int, seq_len: int, seed: int) -> Batch:
    """A text with ``count`` tokens for an image in each row."""
    accepted = inspect.signature(type(model).forward).parameters
    made = draw(model, batch=batch, seq_len=seq_len + count, seed=seed, images=False)
    made["input_ids"][:, 1 : 1 + count] = _image_token(model.config)
    made["attention_mask"][:, : 1 + count] = 1  # padding is of the text
    if made["labels"].shape == made["input_ids"].shape:
        made["labels"][:, 1 : 1 + count] = IGNORED
    marks = torch.zeros_like(made["input_ids"])
    marks[:, 1 : 1 + count] = 1
    return made | {key: marks for key in MARKS if key in accepted}


def _encoder(model: Any) -> Callable[..., Any] | None:
    """The method that computes features of images, or of a video's frames."""
    return next((getattr(part, name) for part, name in _encoders(model)), None)


def _encoders(model: Any) -> list[tuple[Any, str]]:
    """Where such methods are, by their names: in the model, or in its base model."""
    places = {(id(part), name): (part, name) for name in ENCODERS for part in (model, model.base_model)}
    return [(part, name) for part, name in places.values() if hasattr(part, name)]


def _image_token(config: Any) -> int:
    for name in IMAGE_TOKENS:
        if isinstance(token := getattr(config, name, None), int):
            return token
    return int(config.vocabulary_map["<image>"])


def _images_beside_text(
    model: Any, *, layout: Layout, as_long: bool, batch: int, seq_len: int, seed: int, width: int | None = None
) -> Batch:
    """An image for each row, without tokens in its text: cross-attention reads it, or it precedes the text.

    The labels are ``as_long`` as the text, or as long as the model's kind takes them.
    """
    accepted, tokens = inspect.signature(type(model).forward).parameters, Tokens(model, seed, width=width)
    length = seq_len if as_long else None
    read = _accepted(layout(getattr(model.config, "encoder", model.config), tokens, batch), accepted)
    if "input_ids" in accepted:
        made = draw(model, batch=batch, seq_len=seq_len, seed=seed, images=False, labels=length)
        places = _places(model.config, tokens, batch, seq_len)
        read |= {key: value for key, value in places.items() if key in accepted}
    else:
        made = {"labels": tokens.labels(batch, seq_len)}
    return fit({**made, **read}, model)


def _accepted(layout: Batch, accepted: Container[str]) -> Batch:
    """The part of a layout that the model accepts; raises ``ValueError`` if that is without the pixels."""
    taken = {key: value for key, value in layout.items() if key in accepted}
    if not any(key in taken for key in PIXELS):
        raise ValueError(f"images are not passed as {', '.join(PIXELS)}")
    return taken


def _places(config: Any, tokens: Tokens, batch: int, seq_len: int) -> Batch:
    """For each token of a text its position on the page, and a mask over one image."""
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
    """The configuration that states the sizes of images."""
    parts = (config, getattr(config, "encoder", None))
    return next((v for c in parts if (v := getattr(c, "vision_config", None)) is not None), config)


def _number(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _size(config: Any, tokens: Tokens) -> tuple[int, int]:
    """Channels and width of an image: of the configuration's size, else of that asked for, else of a few patches."""
    vision = _vision(config)
    size, patch = getattr(vision, "image_size", None), _number(getattr(vision, "patch_size", 8))
    return _channels(vision), _number(size or (tokens.width or 4 * patch) // patch * patch)


def _channels(vision: Any) -> int:
    return int(getattr(vision, "num_channels", getattr(vision, "in_channels", 3)))


def _tiles_of(config: Any) -> int:
    return int(getattr(_vision(config), "max_num_tiles", 1))


def _plain(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Whole images, with their sizes, and the further inputs that some models need."""
    channels, size = _size(config, tokens)
    made = {
        "pixel_values": tokens.features(batch, channels, size, size),
        "image_sizes": torch.tensor([[size, size]] * batch),
        "qformer_input_ids": tokens.ids(batch, 8),
    }
    if (finer := getattr(config, "high_res_vision_config", None)) is not None:
        made["high_res_pixel_values"] = tokens.features(batch, channels, finer.image_size, finer.image_size)
    return made


def _whole(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Whole images and nothing beside them."""
    channels, size = _size(config, tokens)
    return {"pixel_values": tokens.features(batch, channels, size, size)}


def width_of(config: Any, made: Mapping[str, Tensor]) -> int:
    """The width of the images of a batch, in pixels; they are square."""
    vision = _vision(config)
    sides = next((made[key] for key in SIDES if key in made), None)
    if sides is not None:
        return int(sides[0, -1]) * _number(vision.patch_size)
    pixels = next(made[key] for key in PIXELS if key in made)
    if pixels.dim() > 3 and pixels.shape[-1] == pixels.shape[-2]:
        return pixels.shape[-1]
    return math.isqrt(pixels.numel() // (len(pixels) * _channels(vision)))


def _nested(config: Any, tokens: Tokens, batch: int) -> Batch:
    """For each row a list of one image."""
    made = _plain(config, tokens, batch)
    return {**made, "pixel_values": made["pixel_values"].unsqueeze(1)}


def _tiles(config: Any, tokens: Tokens, batch: int) -> Batch:
    """For each row a list of one tile, with a mask of those that are no padding."""
    return {**_nested(config, tokens, batch), "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool)}


def _tiled(config: Any, tokens: Tokens, batch: int) -> Batch:
    """The whole of each image and one tile of it, with its size, as LLaVA-NeXT reads them."""
    made = _plain(config, tokens, 2 * batch)
    pixels = made["pixel_values"]
    return {"pixel_values": pixels.view(batch, 2, *pixels.shape[1:]), "image_sizes": made["image_sizes"][:batch]}


def _tiles_in_one(config: Any, tokens: Tokens, batch: int) -> Batch:
    """For each row a list of one image of the largest number of tiles, all but one of them masked (Llama 3.2)."""
    (channels, size), tiles = _size(config, tokens), _tiles_of(config)
    seen = (torch.arange(tiles) == 0).long().expand(batch, 1, tiles)
    return {
        "pixel_values": tokens.features(batch, 1, tiles, channels, size, size),
        "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.int64),
        "aspect_ratio_mask": seen,
    }


def _grid(config: Any, tokens: Tokens, batch: int) -> tuple[int, int, Batch]:
    """Patches along a side, numbers in a patch, and the keyword arguments that tell a model so."""
    vision = _vision(config)
    merges = (getattr(part, name, None) for part in (vision, config) for name in MERGES)
    merge = _number(next((m for m in merges if m is not None), 1))
    frames = getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1))
    patch = getattr(vision, "model_patch_size", _number(vision.patch_size))
    side = merge * _squares_along(vision, tokens, merge * patch)
    return side, _channels(vision) * patch**2 * _number(frames), {
        "image_grid_thw": torch.tensor([[1, side, side]] * batch),
        "image_grid_hw": torch.tensor([[side, side]] * batch),
        "target_sizes": torch.tensor([[side, side]] * batch),
        "image_merge_sizes": torch.tensor([merge] * batch),
    }  # fmt: skip


def _squares_along(vision: Any, tokens: Tokens, square: int) -> int:
    """How many squares of so many pixels, each of which becomes a token, are along a side: two, unless a width is asked for."""
    if tokens.width is None:
        return 2
    most = getattr(vision, "default_output_length", None)  # Gemma 4's, of tokens for an image
    return min(max(1, round(tokens.width / square)), math.isqrt(most) if most else tokens.width)


def _patches(config: Any, tokens: Tokens, batch: int) -> Batch:
    """A sequence of patches, with the grid that they come from, as in Qwen-VL."""
    side, width, sizes = _grid(config, tokens, batch)
    return {"pixel_values": tokens.features(batch * side * side, width), **sizes}


def _squares(config: Any, tokens: Tokens, batch: int) -> Batch:
    """A sequence of patches, each still a small image."""
    vision, (side, _, sizes) = _vision(config), _grid(config, tokens, batch)
    patch = _number(vision.patch_size)
    return {"pixel_values": tokens.features(batch * side * side, _channels(vision), patch, patch), **sizes}


def _strip(config: Any, tokens: Tokens, batch: int) -> Batch:
    """The patches of all images side by side in one low image, as in MiniCPM-V."""
    made = _squares(config, tokens, batch)
    return {**made, "pixel_values": torch.cat(list(made["pixel_values"]), dim=-1).unsqueeze(0)}


def _blocks(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Squares of patches that become one token, colours last, with the grid of these squares."""
    vision, (side, _, _) = _vision(config), _grid(config, tokens, batch)
    width = side // 2 * _number(vision.patch_size)
    pixels = tokens.features(batch * 4, width, width, _channels(vision))
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]] * batch)}


def _cubes(config: Any, tokens: Tokens, batch: int) -> Batch:
    """A sequence of patches, each with its frames, colours last."""
    vision = _vision(config)
    frames, patch = getattr(vision, "temporal_patch_size", 1), _number(vision.patch_size)
    return {"pixel_values": tokens.features(batch * 4, frames, patch, patch, _channels(vision))}


def _rows(config: Any, tokens: Tokens, batch: int) -> Batch:
    """For each image a sequence of patches, with the position of each; padded to one length, but none needs it here."""
    side, width, _ = _grid(config, tokens, batch)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return {
        "pixel_values": tokens.features(batch, side * side, width),
        "image_position_ids": places.expand(batch, -1, -1),
        "spatial_shapes": torch.tensor([[side, side]] * batch),
        "pixel_attention_mask": torch.ones(batch, side * side, dtype=torch.int64),
        # Two neighbours become one token.
        "image_token_pooling": torch.arange(batch * side * side // 2 * 2).view(-1, 2),
        "image_grids": torch.tensor([[side, side // 2, 0, 0]] * batch),
    }


def _flattened(config: Any, tokens: Tokens, batch: int) -> Batch:
    """For each image a sequence of patches, each with its row and column before its numbers, as in Pix2Struct."""
    vision = _vision(config)
    width = getattr(vision, "patch_embed_hidden_size", None) or _channels(vision) * _number(vision.patch_size) ** 2
    places = torch.cartesian_prod(torch.arange(1.0, 3.0), torch.arange(1.0, 3.0)).expand(batch, -1, -1)
    return {"flattened_patches": torch.cat([places, tokens.features(batch, 4, width)], dim=-1)}


# The first that fits is taken: a strip before squares, of which MiniCPM-V would read the first alone.
WITHIN_TEXT = (
    _patches, _plain, _nested, _tiles, _tiled, _strip, _squares, _blocks, _cubes, _rows,
)  # fmt: skip
BESIDE_TEXT = (_plain, _nested, _tiles_in_one, _flattened)
