"""Training batches for any kind of model: deterministic, ragged where the model takes a mask, with labels that vary."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kbitcheck.core import machine
from kbitcheck.core.errors import UsageError
from kbitcheck.models.vocabulary import COMMON

IGNORED = -100
ROWS, LENGTH, SHORT = 2, 24, 8
UNICODE = 0x110000

Batch = dict[str, Tensor]
Shape = Mapping[str, Any]  # batch, seq_len and seed


def draw(
    model: PreTrainedModel,
    *,
    batch: int,
    seq_len: int,
    seed: int,
    images: bool = True,
    image_tokens: int | None = None,
    labels: int | None = None,
    lengths: Sequence[int] = (),
) -> Batch:
    """Inputs and ``labels`` for one training step of ``model``, on the device of its embeddings.

    ``input_ids``, ``attention_mask`` and ``labels`` are int64 of shape (batch, seq_len); the last row of a batch of two
    or more is padded on the right, with a mask of zeros and labels of -100, unless ``lengths`` states the tokens of each
    row. A classifier's labels have shape (batch,); an encoder-decoder's have half the length, or ``labels``. Image tokens
    come on top of ``seq_len``: ``image_tokens`` of them, by default one for each patch. ``pixel_values`` (batch, channels,
    height, width) and ``input_features`` (batch, mel bins, frames) are floating, in the dtype that ``fit`` chooses. Without
    ``images`` a model that reads text gets text alone. The global generator is not used.
    """
    accepted = inspect.signature(type(model).forward).parameters
    drawn = Tokens(model, seed, [length / seq_len for length in lengths])
    if images and "pixel_values" in accepted and "input_ids" in accepted:
        made = _image_text(model, drawn, batch, seq_len, image_tokens)
    elif model.main_input_name == "input_features":
        made = _speech(model, drawn, batch, seq_len)
    elif "input_ids" in accepted:
        made = _text(model, drawn, batch, seq_len, labels)
    else:
        raise UsageError(f"{type(model).__name__} takes {model.main_input_name}: no batch can be made for it")
    return fit({k: v for k, v in made.items() if k in accepted}, model)


def fit(batch: Batch, model: PreTrainedModel) -> Batch:
    """The batch on the device of the model's embeddings, floating inputs in the dtype of its first convolution.

    A speech encoder does not cast its input, so that the loaded and the prepared model need different dtypes. float16,
    bfloat16 and wider dtypes hold the same numbers.
    """
    try:
        embeddings: Any = model.get_input_embeddings()
    except NotImplementedError:  # one that has several
        embeddings = model
    device = next(embeddings.parameters() if isinstance(embeddings, torch.nn.Module) else model.parameters()).device
    kernels = (m.weight for m in model.modules() if isinstance(m, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d))
    dtype = next((k.dtype for k in kernels), model.dtype)
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}


def usual_length(model: torch.nn.Module) -> int:
    """Tokens of a row where nobody asks for a length: few for a large model on a CPU, which pays for each of them."""
    weights = list(model.parameters())
    large = sum(weight.nbytes for weight in weights) > machine.LARGE_BYTES
    return SHORT if large and all(weight.device.type == "cpu" for weight in weights) else LENGTH


def first_rows(batch: Mapping[str, Tensor], rows: int) -> Batch:
    """A batch of the first ``rows`` rows of another, each with its images.

    Images may be patches, several for each row, in the first dimension or, where that holds all images, in the longest.
    """
    total = row_count(batch)
    if rows >= total:
        return dict(batch)

    def cut(tensor: Tensor) -> Tensor:
        dim = _dimension_of_rows(tensor, total)
        return tensor.narrow(dim, 0, tensor.shape[dim] * rows // total)

    return {key: cut(value) for key, value in batch.items()}


def one_row(batch: Mapping[str, Tensor], number: int) -> Batch:
    """A batch of one row of another, counted from zero, with its images."""
    total = row_count(batch)

    def cut(tensor: Tensor) -> Tensor:
        dim = _dimension_of_rows(tensor, total)
        size = tensor.shape[dim] // total
        return tensor.narrow(dim, number * size, size)

    return {key: cut(value) for key, value in batch.items()}


def widened(batch: Mapping[str, Tensor], rows: int) -> Batch:
    """Tensors without numbers, on the meta device, of the shapes that a batch of ``rows`` rows would have."""
    total = row_count(batch)

    def shape(tensor: Tensor) -> list[int]:
        dim, sizes = _dimension_of_rows(tensor, total), list(tensor.shape)
        sizes[dim] = sizes[dim] * rows // total
        return sizes

    return {key: torch.empty(shape(t), dtype=t.dtype, device="meta") for key, t in batch.items()}


def row_count(batch: Mapping[str, Tensor]) -> int:
    """The number of rows of a batch."""
    return len(next((batch[key] for key in ("input_ids", "labels") if key in batch), next(iter(batch.values()))))


def _dimension_of_rows(tensor: Tensor, total: int) -> int:
    return 0 if len(tensor) % total == 0 else tensor.shape.index(max(tensor.shape))


class Tokens:
    """Draws tokens that are not special, and features, from a generator of its own; ``width`` is that of an image, in pixels."""

    def __init__(
        self, model: PreTrainedModel, seed: int, shares: Sequence[float] = (), *, width: int | None = None
    ) -> None:
        text = model.config.get_text_config()
        self.generator = torch.Generator().manual_seed(seed)
        self.shares, self.width = shares, width
        self.vocab = int(getattr(text, "vocab_size", UNICODE))  # some read code points
        special: set[int] = set()
        for config in (model.config, text):
            for key, value in config.to_dict().items():
                if key.endswith(("token_id", "token_index")):
                    special.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
        ends = (getattr(text, f"{end}_token_id", None) for end in ("pad", "eos"))
        self.pad = next((token for token in ends if isinstance(token, int)), 0)
        self.plain = torch.tensor([token for token in range(min(self.vocab, COMMON)) if token not in special])

    def ids(self, batch: int, seq_len: int) -> Tensor:
        return self.plain[torch.randint(len(self.plain), (batch, seq_len), generator=self.generator)]

    def labels(self, batch: int, seq_len: int) -> Tensor:
        return self.ids(batch, seq_len).where(self.mask(batch, seq_len).bool(), IGNORED)

    def features(self, *shape: int) -> Tensor:
        # Multiples of 1/64 up to 2 are exact in every floating dtype.
        return torch.randint(-127, 128, shape, generator=self.generator) / 64.0

    def mask(self, batch: int, seq_len: int) -> Tensor:
        mask = torch.ones(batch, seq_len, dtype=torch.int64)
        if self.shares:
            for row, share in enumerate(self.shares):
                mask[row, max(1, round(share * seq_len)) :] = 0
        elif batch > 1:
            mask[-1, seq_len - max(1, seq_len // 4) :] = 0
        return mask


def _text(model: PreTrainedModel, tokens: Tokens, batch: int, seq_len: int, length: int | None = None) -> Batch:
    config, mask = model.config, tokens.mask(batch, seq_len)
    ids = tokens.ids(batch, seq_len).where(mask.bool(), tokens.pad)
    name = type(model).__name__
    if "SequenceClassification" in name:
        labels = _classes(config, tokens, batch)
        if config.is_encoder_decoder and isinstance(config.eos_token_id, int):  # whose state is what is classified
            ids[torch.arange(batch), mask.sum(1) - 1] = config.eos_token_id
    elif "MaskedLM" in name:
        labels = ids.where(mask.bool() & (torch.arange(seq_len) % 3 == 0), IGNORED)
    elif config.is_encoder_decoder:
        length = length or max(4, seq_len // 2)
        labels = tokens.labels(batch, length)
    else:
        labels = ids.where(mask.bool(), IGNORED)
        if isinstance(model.get_input_embeddings(), torch.nn.ModuleList):  # one for each codebook: here one
            labels = labels.unsqueeze(-1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _classes(config: Any, tokens: Tokens, batch: int) -> Tensor:
    if config.num_labels == 1:
        return tokens.features(batch)
    if config.problem_type == "multi_label_classification":
        return (tokens.features(batch, config.num_labels) > 0).float()
    return torch.arange(batch) % int(config.num_labels)


def _speech(model: PreTrainedModel, tokens: Tokens, batch: int, seq_len: int) -> Batch:
    labels, config = tokens.labels(batch, seq_len), model.config
    features = tokens.features(batch, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": features, "labels": labels}


def _image_text(model: PreTrainedModel, tokens: Tokens, batch: int, seq_len: int, image_tokens: int | None) -> Batch:
    config: Any = model.config
    vision, image = (
        getattr(config, "vision_config", None),
        getattr(config, "image_token_id", getattr(config, "image_token_index", None)),
    )
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not (isinstance(size, int) and isinstance(patch, int) and isinstance(image, int)):
        raise UsageError(f"{type(model).__name__}: its images come in a layout that kbitcheck does not support")
    patches = (size // patch) ** 2 + (getattr(config, "vision_feature_select_strategy", "") == "full")
    count = patches if image_tokens is None else image_tokens
    made = _text(model, tokens, batch, seq_len + count)
    made["input_ids"][:, 1 : 1 + count] = image
    made["labels"][:, 1 : 1 + count] = IGNORED
    return {**made, "pixel_values": tokens.features(batch, getattr(vision, "num_channels", 3), size, size)}
