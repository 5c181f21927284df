"""What libraries read of a model: its attributes, its configuration, its signatures, its state, what its methods return."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from kbitcheck.observe.uses.subject import Outcome, Subject, Value, use

PLAIN = (bool, int, float, str, type(None))
SWITCHES = frozenset({"training", "gradient_checkpointing"})  # each of which a rule of its own looks at
SIGNED = ("forward", "prepare_inputs_for_generation")  # whose parameters trainers and generation read


@use
def what_libraries_read(subject: Subject) -> Outcome:
    model: Any = subject.model
    fresh = dict(subject.fresh().named_modules()) if subject.preparation.loaded.copies else {}
    changed = [each for name, module in model.named_modules() for each in _changed(name, fresh.get(name), module)]
    seen: dict[str, Value] = {"changed attributes": ", ".join(changed) or "none"}
    seen["modules with the model's configuration"] = ", ".join(_sharing_configuration(model))
    for method in filter(lambda name: hasattr(model, name), SIGNED):
        seen[f"parameters of {method}"] = ", ".join(inspect.signature(getattr(model, method)).parameters)
    state = model.state_dict()
    others = [n for n, p in model.named_parameters(remove_duplicate=False) if not _same(state.get(n), p)]
    seen["parameters of which a state dict has others"] = ", ".join(others) or "none"
    calls: Mapping[str, Callable[[], Any]] = {
        "train()": model.train,
        "eval()": model.eval,
        "requires_grad_(False)": lambda: model.requires_grad_(False),
    }
    return {
        **seen,
        **{f"what {call} returns": "the model" if act() is model else "not the model" for call, act in calls.items()},
    }


def _changed(name: str, before: nn.Module | None, after: nn.Module) -> Iterator[str]:
    """The plain attributes of a module, each with its value, that have another value in the module ``before``."""
    for attribute, value in vars(after).items() if before is not None else ():
        mine, base = _text(value), _text(getattr(before, attribute, after))
        if (
            attribute not in SWITCHES
            and "hooks" not in attribute
            and mine is not None
            and base is not None
            and mine != base
        ):
            yield f"{f'{name}.' if name else ''}{attribute} is {mine}, not {base}"


def _text(value: Any) -> str | None:
    """A plain value, or one that is made of them, as text; None for any other."""
    if isinstance(value, Mapping):
        entries = {str(key): _text(each) for key, each in value.items()}
        return None if None in entries.values() else str(sorted(entries.items()))
    if isinstance(value, (list, tuple, set, frozenset)):
        each = [_text(entry) for entry in value]
        return None if None in each else str(sorted(map(str, each)))
    return repr(value) if isinstance(value, PLAIN) else None


def _sharing_configuration(model: nn.Module) -> list[str]:
    own = getattr(model, "config", None)
    return [name for name, module in model.named_modules() if name and getattr(module, "config", model) is own]


def _same(saved: Any, held: torch.Tensor) -> bool:
    return isinstance(saved, torch.Tensor) and saved.dtype is held.dtype and torch.equal(saved, held.detach())
