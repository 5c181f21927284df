"""A quantized model on the meta device: every name, shape, dtype and quantization state of the real one, no numbers.

transformers itself says which layers are replaced, and the quantizer's backend what a packed weight and its state
look like.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models import internals
from kbitcheck.models import load as loading


def build(
    config: Mapping[str, Any],
    quant: Quantization | None,
    options: loading.Options,
    *,
    quantized: bool = False,
    drawn: bool = True,
) -> PreTrainedModel:
    """The model that loading by these arguments would give, in eval mode, on the meta device.

    ``config`` holds a ``config.json``'s fields. A checkpoint that is ``quantized`` already states all it skips. Of one that is
    not ``drawn`` at random, the tensors are tied as its configuration says. Without ``quant`` nothing is quantized.
    """
    if quant is not None and (reason := quant.backend.unavailable()):
        raise UsageError(reason)
    fields = {k: v for k, v in config.items() if k != "quantization_config"}
    dtype: torch.dtype = getattr(torch, options.dtype)
    configured = loading.configuration(fields, name=options.name)
    with loading.quiet(), loading.errors_as_usage(options.name):
        cls = loading.architecture(configured, trust_remote_code=options.trust_remote_code)
        if options.attention:
            internals.choose_implementation(configured, options.attention)
        with _default_dtype(dtype), _without_initial_values():
            model = loading.empty(cls, configured)
            if quant is not None:
                skip = loading.automatic_skip(cls, configured) if quant.skip and not quantized else []
                _replace_layers(model, quant, skip, dtype, config.get("quantization_config") or {})
        wide = internals.kept_in_float32(model, dtype)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if wide.intersection(name.split(".")):
                tensor.data = tensor.data.to(torch.float32)
        if quant is not None:
            quant.backend.packing.quantize_empty(model, dtype)
            if not quantized:
                with quant.backend.packing.as_on_meta():
                    quant.backend.complete(model, quant, quant.skip)
        model.tie_weights()
        if not drawn and _saved_untied(config, model):
            internals.untie_head(model)
        model.eval()
    return model


def _saved_untied(config: Mapping[str, Any], model: PreTrainedModel) -> bool:
    """Whether a checkpoint has a head of its own although its class ties heads, as T5 v1.1 does in transformers 5.

    Loading finds two tensors that differ then, and ties nothing.
    """
    return (
        config.get("tie_word_embeddings") is False and "text_config" not in config and model.config.tie_word_embeddings
    )


def _replace_layers(
    model: PreTrainedModel, quant: Quantization, skip: list[str], dtype: torch.dtype, described: Mapping[str, Any]
) -> None:
    if quant.backend.static_only and (described or quant.backend.not_on_load()):
        quant.backend.lay_out(model, described, loading.automatic_skip(type(model), model.config))
        return
    configured = quant.config(skip)
    if configured is None:
        automatic = skip or loading.automatic_skip(type(model), model.config)
        quant.backend.quantize(model, quant, [*automatic, *quant.skip])
    else:
        internals.replace_layers(AutoHfQuantizer.from_config(configured, pre_quantized=False), model, dtype)


@contextmanager
def _without_initial_values() -> Iterator[None]:
    """Modules that are made keep their parameters as they are: there are no numbers to draw."""
    drawn: dict[str, Any] = {
        name: lambda tensor, *_, **__: tensor for name in ("kaiming_uniform_", "uniform_", "normal_")
    }
    with mock.patch.multiple(nn.init, **drawn):
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
