"""Save and reload of a model that never ran, and of its adapters."""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from kbitcheck.core.errors import Raised
from kbitcheck.core.facts import Distance, StoreFacts
from kbitcheck.observe.probes import forwards, step, switches


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The models of a round trip. Each call of ``prepared`` and ``base`` gives a fresh one.

    ``reload`` loads a base from a folder; ``attach`` puts the same adapters on a model each time.
    """

    prepared: Callable[[], Any]
    base: Callable[[], Any]
    reload: Callable[[str], Any]
    prepare: Callable[[Any], Any]
    attach: Callable[[nn.Module], tuple[nn.Module, dict[str, nn.Parameter]]]
    autocast: step.Autocast = nullcontext


def round_trip(subject: Subject, base_keys: frozenset[str], batch: step.Batch) -> StoreFacts:
    """Logits of a prepared model with adapters before and after both are saved and loaded; it has never run.

    If neither the prepared model nor its base can be saved and loaded, the adapters are loaded into another prepared base.
    """
    prepared = subject.prepared()
    keys = frozenset(prepared.state_dict())
    facts: dict[str, Any] = {"missing": tuple(sorted(base_keys - keys)), "unexpected": tuple(sorted(keys - base_keys))}

    def logits(model: nn.Module) -> torch.Tensor:
        # From one seed, as some models draw noise in every forward.
        with switches.seeded(0, batch):
            return forwards.forward_logits(model, batch, subject.autocast)

    with tempfile.TemporaryDirectory(prefix="kbitcheck-store-") as folder:
        error = _raised(partial(prepared.save_pretrained, folder))
        try:
            model, adapters = subject.attach(prepared)
            saved = save({n: p.detach().clone().contiguous() for n, p in adapters.items()})
            first = logits(model)
            del prepared, model, adapters  # at most one of the models exists at a time
            try:
                if error is not None:
                    raise error
                again = subject.prepare(subject.reload(folder))
            except torch.OutOfMemoryError:
                raise
            except Exception:  # saving and loading run transformers' and the model's own code, which may raise anything
                base_error = _raised(partial(_base_round_trip, subject))
                if base_error is None:
                    raise
                facts["base_raised"] = Raised.of(base_error)
                again = subject.prepared()
            model, adapters = subject.attach(again)
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


def _raised(action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error
    return None


def _base_round_trip(subject: Subject) -> None:
    with tempfile.TemporaryDirectory(prefix="kbitcheck-store-") as folder:
        subject.base().save_pretrained(folder)
        subject.reload(folder)
