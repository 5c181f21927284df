"""From a checkpoint directory to a quantized transformers model, silently, with every failure as one line."""

import copy
import inspect
import logging
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kbitcheck import backends
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.models import internals, stored
from kbitcheck.models.checkpoint import CONFIG, read_config

AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
)

NOISE = re.compile(r".*layer_?drop|.*jitter.*|apply_spec_augment")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to load. ``dtype`` is torch's name or ``auto`` (as saved); ``attention`` None leaves attention and
    experts to transformers; ``eager`` is plain torch for both.
    """

    name: str
    device: str = "cpu"
    dtype: str = "auto"
    attention: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


def load(folder: Path, quant: Quantization | None, options: Options) -> PreTrainedModel:
    """The model in ``folder``, quantized by ``quant``; with None, as the checkpoint itself says."""
    with quiet(), errors_as_usage(options.name):
        fields = read_config(folder / CONFIG, options.name)
        if not (options.trust_remote_code and fields.get("auto_map")):  # code from a repository may bring its own type
            _check_type(fields, options.name)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
        return _loaded(folder, config, quant, options)


def stream(
    tensors: Mapping[str, Any], config: PretrainedConfig, quant: Quantization | None, options: Options
) -> PreTrainedModel:
    """A model whose tensors, ``tensors[name][...]``, are read and quantized one at a time. Needs transformers 5."""
    with quiet(), errors_as_usage(options.name):
        return _loaded(None, config, quant, options, state_dict=dict(tensors))


def _loaded(
    folder: Path | None, config: PretrainedConfig, quant: Quantization | None, options: Options, **more: Any
) -> PreTrainedModel:
    if quant is not None and (reason := quant.backend.unavailable()):
        raise UsageError(reason)
    cls = architecture(config, trust_remote_code=options.trust_remote_code)
    still(config)
    if options.attention:
        internals.choose_implementation(config, options.attention)
    configured = quant and quant.config(automatic_skip(cls, config) if quant.skip else [])
    if configured is not None:
        more["quantization_config"] = configured
    loaded = cls.from_pretrained(
        folder,
        config=config,
        dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
        device_map={"": options.device},
        trust_remote_code=options.trust_remote_code,
        use_safetensors=None if options.allow_pickle else True,
        # Names the tensors below. Before transformers 5 it takes quantized Conv1D layers for mismatched.
        ignore_mismatched_sizes=transformers.__version__ >= "5",
        output_loading_info=True,
        **more,
    )
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    packed = folder is not None and getattr(config, "quantization_config", None) is not None
    for what in ("missing keys", "mismatched keys"):
        keys = info.get(what.replace(" ", "_"))
        if keys and packed and folder is not None:  # KB911 tells of packed weights that have no place
            lost = set(stored.lost_names(model, folder))
            keys = [key for key in keys if (key if isinstance(key, str) else key[0]) not in lost]
        if keys:
            raise UsageError(f"{options.name}: not this model's weights: {_listed(what, keys)}")
    if quant is not None and configured is None:
        quant.backend.quantize(model, quant, [*automatic_skip(cls, config), *quant.skip])
    if quant is not None:
        quant.backend.complete(model, quant, quant.skip)
    if packed and folder is not None:
        stored.remember(model, folder)
    backends.steady(model)
    _leave_file(model)
    return model


def _leave_file(model: PreTrainedModel) -> None:
    """Give unquantized parameters memory of their own: one view of a mapped checkpoint keeps all of it resident."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not backends.is_packed(parameter) and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def still(config: PretrainedConfig) -> None:
    """Disable, in place and in every part, whatever is random besides dropout: LayerDrop, router jitter, SpecAugment.

    LayerDrop leaves adapters without gradients, jitter depends on the dtype, and SpecAugment draws its masks over audio
    from numpy's generator: no step could be compared with another, or with the float64 twin's.
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            still(value)
        elif value and NOISE.fullmatch(name):
            setattr(config, name, type(value)(0))


def architecture(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """The class that ``config.architectures`` names, or the first fitting one with a head where it names none."""
    remote = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    if trust_remote_code and remote:
        return getattr(transformers, max(remote, key=lambda name: name.startswith("AutoModelFor")))
    mapped = (internals.mapped_class(auto, config) for auto in AUTO)
    names = config.architectures or [cls.__name__ for cls in mapped if cls is not None]
    for name in names:
        cls = getattr(transformers, name, None)
        if cls is not None and "labels" not in inspect.signature(cls.forward).parameters:
            raise UsageError(f"{name} computes no loss: give a model with a head, such as one for causal modelling")
        if cls is not None:
            return cls
    library = f"transformers {transformers.__version__}"
    raise UsageError(f"{library} has no class {' or '.join(names) or f'with a head for {config.model_type}'}")


def configuration(fields: Mapping[str, Any], *, name: str) -> PretrainedConfig:
    """A configuration from the fields of a ``config.json``; raises ``UsageError`` if transformers refuses them."""
    with quiet(), errors_as_usage(name):
        _check_type(fields, name)
        return AutoConfig.for_model(**fields)


def _check_type(fields: Mapping[str, Any], name: str) -> None:
    kind = fields["model_type"]
    if kind not in CONFIG_MAPPING:
        hint = did_you_mean(kind, CONFIG_MAPPING)
        raise UsageError(f"{name}: transformers {transformers.__version__} knows no model type {kind!r}{hint}")


def empty(cls: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model of this class on the meta device: names and shapes, no numbers."""
    own = copy.deepcopy(config)
    with torch.device("meta"):
        # Only an Auto class, which stands for code that the user trusts, has ``from_config``.
        built = cls.from_config(own, trust_remote_code=True) if hasattr(cls, "from_config") else cls(own)
    return cast(PreTrainedModel, built)


def automatic_skip(cls: Any, config: PretrainedConfig) -> list[str]:
    """Modules that transformers leaves unquantized of its own accord: the head, tied modules, the last module."""
    from transformers import integrations
    from transformers.quantizers import base

    home: Any = base if hasattr(base, "get_keys_to_not_convert") else integrations  # before transformers 5
    return sorted(home.get_keys_to_not_convert(empty(cls, config)))


@contextmanager
def errors_as_usage(name: str) -> Iterator[None]:
    """Turns whatever loading raises into a ``UsageError`` of one line. Running out of memory is not wrong usage."""
    try:
        yield
    except (UsageError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = shorten(f"{type(error).__name__}: {error}", width=240, placeholder=" ...")
        if any(isinstance(cause, pickle.UnpicklingError) for cause in _causes(error)):
            reason = "its pickle is damaged, or holds more than tensors"
        raise UsageError(f"{name} cannot be loaded ({reason})", cause=reason) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps logs, warnings and progress bars of loading off the screen; not with KBITCHECK_DEBUG=1."""
    if os.environ.get("KBITCHECK_DEBUG") == "1":
        yield
        return
    hf: Any = transformers.utils.logging
    bars, threshold = hf.is_progress_bar_enabled(), logging.root.manager.disable
    hf.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(threshold)
        if bars:
            hf.enable_progress_bar()


def _listed(what: str, keys: Any) -> str:
    names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
