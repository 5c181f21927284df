"""Ways by which a model's weights leave their place and come back: to another device, through a state dict, into an offload."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Forward = Callable[[nn.Module], object]


def there_and_back(model: nn.Module, forward: Forward) -> None:
    """To the CPU and back to the model's device; a library's own ``to`` runs where that is the CPU, too."""
    device = next(model.parameters()).device
    model.cpu()
    model.to(device)


def through_a_state_dict(model: nn.Module, forward: Forward) -> None:
    """Out of the model and into it, as code does that keeps the best state. Entries that only a library's loader reads are left out."""
    model.load_state_dict(model.state_dict(), strict=False)


def offloaded(model: nn.Module, forward: Forward) -> None:
    """Weights wait on the CPU, and each layer fetches its own for one evaluation; accelerate's hooks are removed at the end."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    # By the names of modules: a model's own state dict may name the layers under adapters as if there were none.
    stored = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            stored.update(module.state_dict(prefix=f"{name}."))
    cpu_offload(model, next(model.parameters()).device, state_dict={n: t.detach().cpu() for n, t in stored.items()})
    try:
        forward(model)
    finally:
        remove_hook_from_submodules(model)


MOVES: Mapping[str, Callable[[nn.Module, Forward], None]] = {
    "move": there_and_back,
    "state-dict": through_a_state_dict,
    "offload": offloaded,  # last: where a library cannot, it leaves layers without numbers
}


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
