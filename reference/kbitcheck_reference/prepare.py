"""The reference preparation: what the specification asks of ``prepare``, step by step.

Written from the specification (KB codes in the docstrings), not from any library's implementation.
"""

import inspect
from typing import Any, TypeVar

import torch
from torch import nn

from . import formats
from .adapters import adapter_parameters, enabled_biases
from .input_grads import require_input_grads
from .quantized import is_quantized
from .upcast import HALF_DTYPES, castable_parameters, upcast

ModelT = TypeVar("ModelT", bound=nn.Module)

_NEW_NAME, _OLD_NAME = "activation_checkpointing_enable", "gradient_checkpointing_enable"


def prepare_model_for_kbit_training(
    model: ModelT,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> ModelT:
    """Make a quantized model ready for adapters and training, in place (KB501, KB502).

    Checkpointing goes on before anything else changes, because it is the only step that a model can refuse (KB506).
    Training flags, config, buffers, quantization state and all global state are left as they are (KB204, KB409, KB507,
    KB511), and a second call changes nothing (KB504).

    Args:
        model: a model of transformers, a module that wraps one, or one that already carries adapters.
        use_gradient_checkpointing: whether to turn checkpointing on; False turns nothing on and adds no hook (KB402).
        gradient_checkpointing_kwargs: arguments for ``torch.utils.checkpoint``; not changed (KB503).
            ``use_reentrant`` is False unless given here (KB407).

    Returns:
        The very object that was given.

    Raises:
        ValueError: checkpointing was asked for and the architecture has none; the model is as it was.
    """
    if use_gradient_checkpointing:
        parts = checkpointable_parts(model)
        turn_on_checkpointing(parts, gradient_checkpointing_kwargs)
    freeze_base(model)
    upcast_unquantized(model)
    if use_gradient_checkpointing:
        make_inputs_require_grad(parts)
    return model


def checkpointable_parts(model: nn.Module) -> list[nn.Module]:
    """The parts that can checkpoint, at least one; or a refusal before anything changes (KB401, KB506).

    A part is an outermost module that can turn checkpointing on: the model itself, or what a wrapper holds (KB401).
    Parts that hold no quantized layer may lack support where another part has them. A ``ValueError`` names the class of
    the part that lacks it, and the way out.
    """
    parts = _outermost_switches(model)
    able = [part for part in parts if _can_checkpoint(part)]
    unable = [part for part in parts if not _can_checkpoint(part)]
    needed = [part for part in unable if any(map(is_quantized, part.modules()))]
    if not able or needed:
        culprit = type((needed or unable or [model])[0]).__name__
        raise ValueError(f"{culprit} does not support gradient checkpointing; pass use_gradient_checkpointing=False")
    return able


def turn_on_checkpointing(parts: list[nn.Module], kwargs: dict[str, Any] | None) -> None:
    """Turn checkpointing on in every block, with ``use_reentrant`` explicit (KB401, KB404, KB407, KB503, KB509).

    The caller's arguments for ``torch.utils.checkpoint`` win over the default and are not changed.
    """
    explicit = {"use_reentrant": False, **(kwargs or {})}
    for part in parts:
        # transformers 5 renames the method and warns when the old name is called; 4.x knows the old name alone.
        name = _NEW_NAME if hasattr(type(part), _NEW_NAME) else _OLD_NAME
        getattr(part, name)(**{name.replace("_enable", "_kwargs"): dict(explicit)})


def freeze_base(model: nn.Module) -> None:
    """Freeze every base parameter; adapters that are already on keep their flags (KB101, KB106).

    Gradients that a frozen parameter still holds are dropped (KB103).
    """
    kept = adapter_parameters(model)
    if kept:
        kept |= enabled_biases(model, kept)
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
            parameter.grad = None


def upcast_unquantized(model: nn.Module) -> None:
    """Cast every unquantized float16 and bfloat16 parameter to float32, nothing else (KB201 to KB208, KB211, KB603).

    Nothing is cast around layers that take their own dtype alone (KB210).

    Packed weights that a module reads unpacked, such as parametrized experts, are read in float32 too: it multiplies them with
    float32 activations now (KB210).

    One storage at a time (KB601); an accelerator's freed blocks are handed back (KB602).
    """
    if any(getattr(formats.of(module), "FIXES_DTYPES", False) for module in model.modules()):
        return
    parameters = castable_parameters(model)
    upcast(parameters)
    for state in formats.read_states(model):
        if state.dtype in HALF_DTYPES:
            state.dtype = torch.float32
    for kind in {parameter.device.type for parameter in parameters} - {"cpu", "meta"}:
        return_cache(kind)


def return_cache(device_type: str) -> None:
    """Ask the allocator of a type of device (``cuda``), where it keeps a cache, to release its unused blocks (KB602)."""
    empty_cache = getattr(getattr(torch, device_type, None), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def make_inputs_require_grad(parts: list[nn.Module]) -> None:
    """Make the inputs of every tower's first block require grad (KB301, KB505).

    Non-reentrant checkpointing does not need it; it is done all the same, so that the two modes can be switched on the
    same object (KB306), and because transformers 5 does it in both. ``parts`` are checkpointing already.
    """
    for part in parts:
        require_input_grads(part)


def _outermost_switches(module: nn.Module) -> list[nn.Module]:
    if hasattr(type(module), _NEW_NAME) or hasattr(type(module), _OLD_NAME):
        return [module]
    return [part for child in module.children() for part in _outermost_switches(child)]


def _can_checkpoint(part: nn.Module) -> bool:
    if not getattr(part, "supports_gradient_checkpointing", True):
        return False
    flagged = any(hasattr(module, "gradient_checkpointing") for module in part.modules())
    return flagged or _is_old_format(part)


def _is_old_format(part: nn.Module) -> bool:
    """Remote code from before transformers 4.35 sets its flags in ``_set_gradient_checkpointing(module, value)``."""
    setter = getattr(part, "_set_gradient_checkpointing", None)
    return setter is not None and "value" in inspect.signature(setter).parameters
