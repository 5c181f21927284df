"""Images that a model may read: the tokens that stand for them in a text, and the layout of their pixels."""

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kbitcheck.models.inputs.text import IGNORED, Batch, Shape, Tokens, draw, fit

PIXELS = ("pixel_values", "flattened_patches")
ENCODERS = ("get_image_features", "get_video_features")
IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id", "video_token_index")
MARKS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
MERGES = ("spatial_merge_size", "merge_size", "merge_kernel_size", "downsample_factor", "pooling_kernel_size")

Layout = Callable[[Any, Tokens, int], Batch]


def batches_with_images(model: PreTrainedModel, shape: Shape) -> Iterator[Callable[[Any], Batch]]:
    """Functions that make a batch with images for a copy of ``model``, to be tried in this order."""
    accepted = inspect.signature(type(model).forward).parameters
    if "pixel_values" in accepted:
        yield lambda m: draw(m, **shape)
    for layout in WITHIN_TEXT:
        if _encoder(model) and "input_ids" in accepted:
            yield partial(_images_in_text, layout=layout, **shape)
    for layout in BESIDE_TEXT:
        for labels in (None, shape["seq_len"]):
            yield partial(_images_beside_text, layout=layout, length=labels, **shape)


def _images_in_text(model: Any, *, layout: Layout, batch: int, seq_len: int, seed: int) -> Batch:
    """Text with as many tokens for each image as the model itself computes features of it."""
    tokens, accepted = Tokens(model, seed), inspect.signature(type(model).forward).parameters
    pixels = _accepted(layout(model.config, tokens, batch), accepted)
    with torch.no_grad():
        features = _encoder(model.eval())(**fit(pixels, model))  # type: ignore[misc]
    count = _count(features) // batch
    made = draw(model, batch=batch, seq_len=seq_len + count, seed=seed, images=False)
    made["input_ids"][:, 1 : 1 + count] = _image_token(model.config)
    if made["labels"].shape == made["input_ids"].shape:
        made["labels"][:, 1 : 1 + count] = IGNORED
    marks = torch.zeros_like(made["input_ids"])
    marks[:, 1 : 1 + count] = 1
    made |= {key: marks for key in MARKS if key in accepted}
    return fit({**made, **pixels}, model)


@contextmanager
def counted_features(model: Any) -> Iterator[list[int]]:
    """A list that gets, for each call of the model's encoder of images while it is entered, the number of features."""
    numbers: list[int] = []

    def counted(encode: Callable[..., Any]) -> Callable[..., Any]:
        def encoded(*args: Any, **kwargs: Any) -> Any:
            features = encode(*args, **kwargs)
            numbers.append(_count(features))
            return features

        return encoded

    with ExitStack() as stack:
        for part, name in _encoders(model):
            stack.enter_context(mock.patch.object(part, name, counted(getattr(part, name))))
        yield numbers


def _count(features: Any) -> int:
    return sum(part.numel() // part.shape[-1] for part in _parts(features))


def _parts(features: Any) -> Sequence[Tensor]:
    """The features of images, from any form of output: one tensor, or one for each image."""
    states = getattr(features, "pooler_output", None)
    if states is None and (layers := getattr(features, "deepstack_features", None)):
        states = layers[0][1]  # as many in each layer that reads them
    if states is None:
        states = getattr(features, "last_hidden_state", features)
    return states if isinstance(states, list | tuple) else [states]


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
    model: Any, *, layout: Layout, length: int | None, batch: int, seq_len: int, seed: int
) -> Batch:
    """An image for each row, without tokens in its text: cross-attention reads it, or it precedes the text."""
    accepted, tokens = inspect.signature(type(model).forward).parameters, Tokens(model, seed)
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


def _size(config: Any) -> tuple[int, int]:
    """Channels and width of an image of a few patches."""
    vision = _vision(config)
    size, patch = getattr(vision, "image_size", None), _number(getattr(vision, "patch_size", 8))
    return _channels(vision), _number(size or 4 * patch)


def _channels(vision: Any) -> int:
    return int(getattr(vision, "num_channels", getattr(vision, "in_channels", 3)))


def _tiles_of(config: Any) -> int:
    return int(getattr(_vision(config), "max_num_tiles", 1))


def _plain(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Whole images, with their sizes, and the further inputs that some models need."""
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
    (channels, size), tiles = _size(config), _tiles_of(config)
    seen = (torch.arange(tiles) == 0).long().expand(batch, 1, tiles)
    return {
        "pixel_values": tokens.features(batch, 1, tiles, channels, size, size),
        "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.int64),
        "aspect_ratio_mask": seen,
    }


def _grid(config: Any, batch: int) -> tuple[int, int, Batch]:
    """Patches along a side, numbers in a patch, and the keyword arguments that tell a model so."""
    vision = _vision(config)
    merges = (getattr(part, name, None) for part in (vision, config) for name in MERGES)
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
    """A sequence of patches, with the grid that they come from, as in Qwen-VL."""
    side, width, sizes = _grid(config, batch)
    return {"pixel_values": tokens.features(batch * side * side, width), **sizes}


def _squares(config: Any, tokens: Tokens, batch: int) -> Batch:
    """A sequence of patches, each still a small image."""
    vision, (side, _, sizes) = _vision(config), _grid(config, batch)
    patch = _number(vision.patch_size)
    return {"pixel_values": tokens.features(batch * side * side, _channels(vision), patch, patch), **sizes}


def _strip(config: Any, tokens: Tokens, batch: int) -> Batch:
    """The patches of all images side by side in one low image, as in MiniCPM-V."""
    made = _squares(config, tokens, batch)
    return {**made, "pixel_values": torch.cat(list(made["pixel_values"]), dim=-1).unsqueeze(0)}


def _blocks(config: Any, tokens: Tokens, batch: int) -> Batch:
    """Squares of patches that become one token, colours last, with the grid of these squares."""
    vision, (side, _, _) = _vision(config), _grid(config, batch)
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
