"""What transformers says of its quantization methods on this machine: each quantizer is asked, nothing is loaded."""

from collections.abc import Callable, Mapping
from typing import Any

from kbitcheck.backends import registry
from kbitcheck.core.methods import Loading
from kbitcheck.models import internals
from kbitcheck.models.load import quiet

PLACES = {"device_map": {"": "cpu"}}


def described() -> Mapping[str, Mapping[str, Any]]:
    """For each method that transformers lists, the least of a ``quantization_config`` that names it."""
    return {name: internals.method_fields(name) for name in internals.quantizers()}


def loading(config: Mapping[str, Any]) -> Loading:
    """What transformers says of loading a checkpoint with this ``quantization_config``, and of training it.

    A configuration that its class refuses is asked about with all settings left open, as is one that names the method alone.
    """
    method = internals.quantizer_name(config)
    kind = internals.quantizer_of(config)
    if kind is None:
        return Loading(method=method, refused="transformers does not know this method", trainable="no")
    with quiet():
        settings = _settings(config)
        try:
            quantizer = kind(settings, pre_quantized=True)
            refused = _refusal(quantizer)
        except Exception as error:  # a package is missing, or a setting is not there
            quantizer = object.__new__(kind)
            vars(quantizer).update(quantization_config=settings, pre_quantized=True)
            refused = _sentence(error) if isinstance(error, ImportError) else _refusal(quantizer)
        unpacked = _unpacked(config, settings, refused=bool(refused))
        return Loading(method=method, refused=refused, unpacked=unpacked, trainable=_trainable(quantizer, settings))


def _unpacked(config: Mapping[str, Any], settings: Any, *, refused: bool) -> str:
    """What turns the packed weights of a checkpoint into plain numbers; empty where nothing does."""
    if getattr(settings, "dequantize", None) is True and not refused:
        return "loading"
    backend = registry.of_method(config)
    return backend.unpacked_by if backend is not None else ""


def matching() -> Callable[[str, str], bool] | None:
    """Whether transformers takes an entry of a skip list for a module's name; None before transformers 5, where each method has its own."""
    try:
        from transformers.quantizers.quantizers_utils import should_convert_module
    except ImportError:
        return None
    return lambda entry, name: not should_convert_module(name, [entry])


class _Open:
    """Settings of a quantizer that are all left open: each is None, and ``read`` has the names of those that were read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        self.read.append(name)


def _settings(config: Mapping[str, Any]) -> Any:
    if config == internals.method_fields(internals.quantizer_name(config)):
        return _Open()
    try:
        return internals.quantization_config(config)
    except Exception:  # a package is missing, or the fields are of another release
        return _Open()


def _refusal(quantizer: Any) -> str:
    try:
        quantizer.validate_environment(**PLACES)
    except AttributeError:  # it looks for a checkpoint's file, and there is none
        return ""
    except Exception as error:
        return _sentence(error)
    return ""


def _sentence(error: Exception) -> str:
    """The first sentence of an exception's message."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")


def _trainable(quantizer: Any, settings: Any) -> str:
    if isinstance(settings, _Open):
        settings.read.clear()
    try:
        answer = quantizer.is_trainable
    except ImportError as error:
        return f"needs {error.name}"
    except AttributeError as error:
        return f"depends on {error.name}"
    if isinstance(settings, _Open) and settings.read:
        return f"depends on {', '.join(dict.fromkeys(settings.read))}"
    return "yes" if answer else "no"
