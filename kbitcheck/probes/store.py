"""Save and reload of a model that never ran, and of its adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kbitcheck.core import cause
from kbitcheck.facts import Distance, StoreFacts
from kbitcheck.probes import step, twin

Attach = Callable[[nn.Module], tuple[nn.Module, dict[str, nn.Parameter]]]


def round_trip(
    prepared: Any,
    base_keys: frozenset[str],
    reload: Callable[[str], nn.Module],
    attach: Attach,
    batch: step.Batch,
    autocast: Any = None,
) -> StoreFacts:
    """Save ``prepared``, ``reload`` it (which prepares it again), put the same adapters on both and compare logits.

    The saved model is fresh: it has never run. Everything written goes to a temporary directory that is removed.
    """
    keys = frozenset(prepared.state_dict())
    missing, unexpected = tuple(sorted(base_keys - keys)), tuple(sorted(keys - base_keys))
    with tempfile.TemporaryDirectory(prefix="kbitcheck-store-") as folder:
        try:
            prepared.save_pretrained(folder)
            again = reload(folder)
            here, adapters = attach(prepared)
            there, fresh = attach(again)
            _carry_over(adapters, fresh, folder)
            first, second = (_logits(model, batch, autocast) for model in (here, there))
        except Exception as error:
            raised = cause(error)
            return StoreFacts(missing=missing, unexpected=unexpected, raised=raised, logits=None)
    return StoreFacts(
        missing=missing,
        unexpected=unexpected,
        raised="",
        logits=Distance(equal=torch.equal(first, second), relative=step.distance(second, first)),
    )


def _logits(model: nn.Module, batch: step.Batch, autocast: Any) -> torch.Tensor:
    # From one seed, as some models draw noise in every forward.
    with step.seeded(0, str(next(iter(batch.values())).device)):
        return twin.forward_logits(model, batch, autocast() if autocast else None)


def _carry_over(saved: Mapping[str, nn.Parameter], fresh: Mapping[str, nn.Parameter], folder: str) -> None:
    """Adapters to a file and back into the other model, whose own were blanked."""
    from safetensors.torch import load_file, save_file

    path = f"{folder}/kbitcheck-adapters.safetensors"
    save_file({n: p.detach().clone().contiguous() for n, p in saved.items()}, path)
    loaded = load_file(path)
    for name, parameter in fresh.items():
        parameter.data = torch.zeros_like(parameter).copy_(loaded[name])
