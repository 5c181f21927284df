"""Save and reload of a model that never ran, and of its adapters."""

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn
from transformers import PreTrainedModel

from kbitcheck.core.errors import Raised, Unavailable
from kbitcheck.core.facts import Distance, StoreFacts
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes import forwards, process_state, step, switches


def round_trip(preparation: Preparation) -> StoreFacts:
    """Logits of a prepared model with adapters before and after both are saved and loaded; it has never run.

    If neither the prepared model nor its base can be saved and loaded, the adapters are loaded into another prepared base.
    """
    prepared = preparation.prepared_copy()
    if not hasattr(prepared, "save_pretrained"):
        raise Unavailable(f"{type(prepared).__name__} has no save_pretrained")
    whole = isinstance(prepared, PreTrainedModel)  # a wrapper, as PEFT's, saves its adapters alone
    facts: dict[str, Any] = differences(preparation.loaded.state_keys, frozenset(prepared.state_dict()))

    def logits(model: nn.Module) -> torch.Tensor:
        # From one seed, as some models draw noise in every forward.
        with switches.seeded(0, preparation.batch):
            return forwards.forward_logits(model, preparation.batch, preparation.autocast)

    with tempfile.TemporaryDirectory(prefix="saved-") as folder:
        with process_state.effects(prepared) as effects:
            error = _raised(partial(prepared.save_pretrained, folder))
        facts["effects"] = effects
        try:
            model, adapters = preparation.attach(prepared)
            saved = save({n: p.detach().clone().contiguous() for n, p in adapters.items()})
            first = logits(model)
            del prepared, model, adapters  # at most one of the models exists at a time
            try:
                if error is not None:
                    raise error
                again = preparation.apply(_reloaded(preparation, folder)) if whole else preparation.prepared_copy()
            except torch.OutOfMemoryError:
                raise
            except Exception:  # saving and loading run transformers' and the model's own code, which may raise anything
                base_error = _raised(partial(_base_round_trip, preparation))
                if base_error is None:
                    raise
                facts |= _of_base(preparation, base_error)
                again = preparation.prepared_copy()
            model, adapters = preparation.attach(again)
            loaded = load(saved)
            for name, parameter in adapters.items():
                parameter.data = torch.zeros_like(parameter).copy_(loaded[name])
            second = logits(model)
        except torch.OutOfMemoryError:  # no property of the model
            raise
        except Exception as error:
            return StoreFacts(**facts, raised=Raised.of(error))
    distance = Distance(equal=torch.equal(first, second), relative=step.distance(second, first))
    return StoreFacts(**facts, logits=distance)


def differences(base: frozenset[str], prepared: frozenset[str]) -> dict[str, Any]:
    """Keys of a state dict that a preparation took away (``missing``) and that it added (``unexpected``)."""
    return {"missing": tuple(sorted(base - prepared)), "unexpected": tuple(sorted(prepared - base))}


def _raised(action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error
    return None


def _reloaded(preparation: Preparation, folder: str) -> Any:
    return preparation.loaded.reload(folder, preparation.spec.device)


def _of_base(preparation: Preparation, error: Exception) -> dict[str, Any]:
    """What a base raised that was saved and loaded; nobody's fault where its configuration does not say how it is packed."""
    config = getattr(preparation.loaded.pristine, "config", None)
    if getattr(config, "quantization_config", None) is None:
        return {}
    return {"base_raised": Raised.of(error)}


def _base_round_trip(preparation: Preparation) -> None:
    with tempfile.TemporaryDirectory(prefix="saved-") as folder:
        preparation.copy().save_pretrained(folder)
        _reloaded(preparation, folder)
