"""What libraries read of a model: its attributes, its configuration, its signatures, its state, what its methods return."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from kbitcheck.observe import internals
from kbitcheck.observe.probes.parts import parts
from kbitcheck.observe.uses.subject import Outcome, Subject, Value, use

PLAIN = (bool, int, float, str, type(None))
SWITCHES = frozenset({"training", "gradient_checkpointing"})  # each of which a rule of its own looks at
# What transformers, Accelerate, PEFT and TRL ask of a model that may not have it: one that gets it is treated otherwise.
READ = frozenset(
    {
        "_hf_peft_config_loaded", "_is_accelerate_prepared", "_is_peft_model", "_keys_to_ignore_on_save", "_no_split_modules", "_orig_mod",
        "_tied_weights_keys", "_tp_plan", "_tp_size", "accepts_loss_kwargs", "all_tied_weights_keys", "base_model_prefix", "hf_device_map",
        "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_parallelizable", "is_quantized", "main_input_name", "model_parallel",
        "peft_config", "quantization_method", "supports_gradient_checkpointing", "tp_size",
    }
)  # fmt: skip
ABSENT = "absent"
SIGNED = ("forward", "prepare_inputs_for_generation")  # whose parameters trainers and generation read


@use
def what_libraries_read(subject: Subject) -> Outcome:
    model: Any = subject.model
    fresh = dict(subject.fresh().named_modules()) if subject.preparation.loaded.copies else {}
    changed = [each for name, module in model.named_modules() for each in _changed(name, fresh.get(name), module)]
    seen: dict[str, Value] = {"changed attributes": ", ".join(changed) or "none"}
    together = sorted(_stored_together(model) - (_stored_together(fresh[""]) if fresh else set()))
    seen["parameters in a storage with others"] = ", ".join(together) or "none"
    if fresh:
        own, base = (getattr(each, "generation_config", None) for each in (model, fresh[""]))
        seen["changed defaults of generate()"] = ", ".join(_changed_defaults(own, base)) or "none"
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
    """The plain attributes of a module, each with its value, that have another value in the module ``before``.

    Of those that libraries read it is a value, too, that there is none; no other matters that is there in one of them alone.
    """
    for attribute in sorted({*vars(after), *READ}) if before is not None else ():
        mine, base = (_value_of(attribute, module) for module in (after, before))
        if (
            attribute not in SWITCHES
            and "hooks" not in attribute
            and mine is not None
            and base is not None
            and mine != base
        ):
            yield f"{f'{name}.' if name else ''}{attribute} is {mine}, not {base}"


def _changed_defaults(own: Any, base: Any) -> Iterator[str]:
    """What differs between two configurations of generation; no cache is what checkpointing asks for."""
    mine, others = (each.to_dict() if each is not None else {} for each in (own, base))
    for name in sorted({*mine, *others} - {"use_cache"}):
        if mine.get(name) != others.get(name):
            yield f"{name} is {mine.get(name)}, not {others.get(name)}"


def _value_of(attribute: str, module: nn.Module | None) -> str | None:
    """An attribute's plain value; of one that libraries read also that it is absent, or of which class it is."""
    value = getattr(module, attribute, ABSENT if attribute in READ else object())
    return ABSENT if value is ABSENT else _text(value) or (type(value).__name__ if attribute in READ else None)


def _stored_together(model: nn.Module) -> set[str]:
    """Names of the parameters, each of which has a storage that another one has, too: who saves one, saves both."""
    storages: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters():
        storages.setdefault(internals.storage_id(next(parts(parameter))), []).append(name)
    return {name for names in storages.values() if len(names) > 1 for name in names}


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
