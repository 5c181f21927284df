"""Make the inputs of checkpointed blocks require grad, with hooks that ``disable_input_require_grads()`` removes.

Reentrant checkpointing builds no graph for a block none of whose inputs requires grad. transformers hooks the output of
the input embeddings for that; this module keeps to its mechanism and mends what it leaves open: earlier hooks stay
(KB505), the hook is a closure that cannot be pickled (KB705), it fails on outputs that are no tensor, and towers whose
input comes from no embedding get none (KB301).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

# The closures that transformers and PEFT register, and the functions of this file.
_HOOK_NAMES = frozenset(
    {"make_inputs_require_grads", "make_inputs_require_grad", "output_requires_grad", "tower_input_requires_grad"}
)
_BLOCK = "GradientCheckpointingLayer"
_INPUT_NAMES = ("hidden_states", "inputs_embeds", "input_features", "input_values", "pixel_values")


def output_requires_grad(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook: make an embedding's floating-point output require grad where a graph is being built."""
    if _can_require_grad(output):
        output.requires_grad_(True)


def tower_input_requires_grad(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: hand on an input that requires grad, not touching the caller's tensor."""
    if args and _can_require_grad(args[0]):
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
    for name in _INPUT_NAMES:
        if _can_require_grad(kwargs.get(name)):
            return args, {**kwargs, name: kwargs[name].detach().requires_grad_(True)}
    return None


def require_input_grads(model: nn.Module) -> None:
    """Leave exactly one removable hook an input embedding, and one where each tower begins (KB301, KB505).

    Calling it again changes nothing but the hooks' handles (KB504). The model is checkpointing already; one without
    ``enable_input_require_grads`` gets the towers' hooks only.
    """
    remove_input_grad_hooks(model)
    if callable(getattr(model, "enable_input_require_grads", None)) and _exposes_embeddings(model):
        model.enable_input_require_grads()  # type: ignore[operator]  # a method of PreTrainedModel
        _replace_closures(model)
    handles = _tracked_handles(model)
    for entry in dict.fromkeys(_tower_entries(model)):
        handles.append(entry.register_forward_pre_hook(tower_input_requires_grad, with_kwargs=True))
    # `disable_input_require_grads` walks the list in transformers 5, and removes the single handle in 4.x.
    vars(model).update(_require_grads_hooks=handles, _require_grads_hook=Handles(handles))


class Handles:
    """Hook handles that are removed together; stands where transformers 4.x keeps its single handle."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self.handles = handles

    def remove(self) -> None:
        """Remove every hook; a second call does nothing."""
        for handle in self.handles:
            handle.remove()


def remove_input_grad_hooks(model: nn.Module) -> None:
    """Remove every input-grad hook in ``model``, those too that a second ``enable_input_require_grads`` has leaked."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__name__", "") in _HOOK_NAMES]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    vars(model).pop("_require_grads_hooks", None)
    vars(model).pop("_require_grads_hook", None)


def _tracked_handles(model: nn.Module) -> list[RemovableHandle]:
    """The handles that ``enable_input_require_grads`` has just stored, in the way of transformers 5 or 4."""
    state = vars(model)
    single = [state["_require_grads_hook"]] if "_require_grads_hook" in state else []
    return list(state.get("_require_grads_hooks", single))


def _replace_closures(model: nn.Module) -> None:
    """Put the module-level hook where transformers has registered its closure; the handles stay good."""
    for module in model.modules():
        for key, hook in module._forward_hooks.items():
            if getattr(hook, "__name__", "") in _HOOK_NAMES:
                module._forward_hooks[key] = output_requires_grad


def _exposes_embeddings(model: nn.Module) -> bool:
    """Whether any part of the model can name its input embeddings; if none can, transformers would only warn."""
    for module in model.modules():
        if not hasattr(type(module), "get_input_embeddings"):
            continue
        try:
            embeddings = module.get_input_embeddings()  # type: ignore[operator]  # a method of PreTrainedModel
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(embeddings, nn.Module):
            return True
    return False


def _tower_entries(module: nn.Module, container: nn.Module | None = None) -> Iterator[nn.Module]:
    """Yield, for every tower, the module whose inputs are checkpointed first and whose hooks run before checkpointing.

    That is the tower's first block, or the container that carries the flag where hooks on a block come too late.
    """
    if hasattr(module, "gradient_checkpointing"):
        container = module
        if not any(map(_is_block, module.modules())):
            yield module
            return
    first = next(filter(_is_block, module.children()), None)
    if first is not None:
        entry = first if _hooks_run_outside(first) else container or module
        if entry is first or not getattr(entry, "_requires_grad", False):  # as of audio models: it sees to it itself
            yield entry
    for child in module.children():
        if not _is_block(child):
            yield from _tower_entries(child, container)


def _is_block(module: nn.Module) -> bool:
    return any(base.__name__ == _BLOCK for base in type(module).__mro__)


def _hooks_run_outside(block: nn.Module) -> bool:
    """Whether a block checkpoints its ``forward``, as transformers 5 does, or ``__call__`` with its hooks."""
    return not any(base.__name__ == _BLOCK and "__call__" in vars(base) for base in type(block).__mro__)


def _can_require_grad(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    return torch.is_grad_enabled() and not value.requires_grad and not value.is_inference()
