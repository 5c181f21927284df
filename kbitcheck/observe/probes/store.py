"""Save and reload of a model that never ran, and of its adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kbitcheck.core.errors import Raised
from kbitcheck.core.facts import Distance, StoreFacts
from kbitcheck.observe.probes import step
from kbitcheck.observe.twin import twins as twin

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

    def logits(model: nn.Module) -> torch.Tensor:
        # From one seed, as some models draw noise in every forward.
        with step.seeded(0, str(next(iter(batch.values())).device)):
            return twin.forward_logits(model, batch, autocast() if autocast else None)

    with tempfile.TemporaryDirectory(prefix="kbitcheck-store-") as folder:
        try:
            prepared.save_pretrained(folder)
            model, adapters = attach(prepared)
            file = _saved(adapters, folder)
            first = logits(model)
            del prepared, model, adapters  # no more than one of them is there at a time
            model, adapters = attach(reload(folder))
            _load(adapters, file)
            second = logits(model)
        except Exception as error:
            return StoreFacts(missing=missing, unexpected=unexpected, raised=Raised.of(error), logits=None)
    return StoreFacts(
        missing=missing,
        unexpected=unexpected,
        raised=None,
        logits=Distance(equal=torch.equal(first, second), relative=step.distance(second, first)),
    )


def _saved(adapters: Mapping[str, nn.Parameter], folder: str) -> str:
    """The file that the adapters were written to."""
    from safetensors.torch import save_file

    path = f"{folder}/kbitcheck-adapters.safetensors"
    save_file({n: p.detach().clone().contiguous() for n, p in adapters.items()}, path)
    return path


def _load(adapters: Mapping[str, nn.Parameter], file: str) -> None:
    """Back from a file into another model's adapters, whose own numbers are blanked."""
    from safetensors.torch import load_file

    loaded = load_file(file)
    for name, parameter in adapters.items():
        parameter.data = torch.zeros_like(parameter).copy_(loaded[name])
