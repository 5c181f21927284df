"""Ways by which a model's weights leave their place and come back: to another device, through a state dict, into an offload."""

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kbitcheck.models.load import quiet

Forward = Callable[[nn.Module], object]


def there_and_back(model: nn.Module, forward: Forward) -> None:
    """To the CPU and back to the model's device; a library's own ``to`` runs where that is the CPU, too."""
    device = next(model.parameters()).device
    model.cpu()
    model.to(device)


def through_a_state_dict(model: nn.Module, forward: Forward) -> None:
    """Out of the model and into it, as code does that keeps the best state. Entries that only a library's loader reads are left out."""
    model.load_state_dict(model.state_dict(), strict=False)


def dispatched(model: nn.Module, forward: Forward) -> None:
    """Accelerate's hooks, as of a ``device_map``, put inputs where each layer's weights are; they stay until ``undispatched``."""
    from accelerate import dispatch_model

    before = {key: value for key, value in vars(model).items() if key == "hf_device_map"}
    dispatch_model(model, {"": next(model.parameters()).device}, force_hooks=True)
    vars(model).pop("hf_device_map")
    vars(model).update(before)
    forward(model)


def undispatched(model: nn.Module, forward: Forward) -> None:
    """Without accelerate's hooks, and what they fetch is there again."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)


def offloaded(model: nn.Module, forward: Forward) -> None:
    """Weights wait on the CPU, and each layer fetches its own for one evaluation."""
    from accelerate import cpu_offload

    cpu_offload(model, next(model.parameters()).device, state_dict=_stored(model))
    try:
        forward(model)
    finally:
        undispatched(model, forward)


def offloaded_to_disk(model: nn.Module, forward: Forward) -> None:
    """Weights wait in files, and each layer reads its own for one evaluation."""
    from accelerate import disk_offload
    from accelerate.utils import offload_state_dict

    with tempfile.TemporaryDirectory(prefix="offloaded-") as folder:
        offload_state_dict(folder, _stored(model))
        disk_offload(model, folder, next(model.parameters()).device)
        try:
            forward(model)
        finally:
            undispatched(model, forward)


def _stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """By the names of modules: a model's own state dict may name the layers under adapters as if there were none."""
    stored = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            stored.update(module.state_dict(prefix=f"{name}."))
    return {name: tensor.detach().cpu() for name, tensor in stored.items()}


MOVES: Mapping[str, Callable[[nn.Module, Forward], None]] = {
    "move": there_and_back,
    "state-dict": through_a_state_dict,
    "dispatch": dispatched,
    "undispatch": undispatched,
    "offload": offloaded,  # last: where a library cannot, it leaves layers without numbers
    "offload-to-disk": offloaded_to_disk,
}


def through_a_checkpoint(base: Any, reloaded: Callable[[str], nn.Module], forward: Forward) -> nn.Module:
    """A base that was evaluated and saved, as it is loaded from there."""
    with quiet(), tempfile.TemporaryDirectory(prefix="saved-") as folder:
        forward(base)
        base.save_pretrained(folder)
        del base
        return reloaded(folder)


def reloads(
    base: nn.Module, reloaded: Callable[[str], nn.Module], forward: Forward, bits: Callable[[nn.Module], object]
) -> bool:
    """Whether libraries save a base and load one that runs and has the same packed weights. The base is used up."""
    before = bits(base)
    try:
        again = through_a_checkpoint(base, reloaded, forward)
        forward(again)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a library's own code, which may raise anything
        return False
    return bool(before == bits(again))


def borne(base: nn.Module, forward: Forward) -> frozenset[str]:
    """The moves that libraries let a base take after an evaluation, whoever prepared it, and that leave it frozen. The base is used up."""

    def bears(name: str) -> bool:
        try:
            MOVES[name](base, forward)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a library's own code, which may raise anything
            return False
        return not any(parameter.requires_grad for parameter in base.parameters())

    base.requires_grad_(False)
    try:
        forward(base)
    except Exception:  # KB210 and KB311 tell of a base that does not run
        return frozenset()
    return frozenset([name for name in MOVES if bears(name)])


def parameters_after(model: nn.Module, kept: Mapping[str, nn.Parameter], move: Callable[[], object]) -> dict[str, Any]:
    """``kept`` as they are once ``move`` ran, which may put other objects in the place of a model's parameters."""
    places = {id(parameter): place for place, parameter in model.named_parameters()}
    move()
    return {name: model.get_parameter(places[id(parameter)]) for name, parameter in kept.items()}
