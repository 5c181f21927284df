"""Many cheap optimizer steps of a model, and looks at places that nobody knows before they are drawn."""

import random
from collections.abc import Iterator, Mapping

import torch

from kbitcheck.observe.probes import step
from kbitcheck.observe.probes.adapters import Attached

LOOKS = 2


def soak(
    attached: Attached, batch: step.Batch, *, steps: int, entropy: str, seed: int, autocast: step.Autocast
) -> Iterator[tuple[str, step.Step]]:
    """The first step, and at each look what a step gives with the adapters as they were before it; by its place.

    In between ``steps`` steps of SGD are taken, and as many evaluations as there are looks.
    """
    model, adapters = attached
    drawn = random.Random(entropy)  # noqa: S311
    looks = {*drawn.sample(range(steps // 2, steps), LOOKS - 1), steps}
    evaluations = set(drawn.sample(range(1, steps), LOOKS))
    start = [p.detach().clone() for p in adapters.values()]

    def taken() -> step.Step:
        return step.train_step(model, batch, adapters, seed=seed, autocast=autocast, watch=False)

    yield "the first step", taken()
    for number in range(1, steps + 1):
        gradients = taken().gradients
        with torch.no_grad():
            for name, parameter in adapters.items():
                gradient = gradients[name]
                if gradient is not None:
                    parameter.sub_(gradient.to(parameter.dtype), alpha=0.01)
        if number in evaluations:
            model.eval()
            with torch.no_grad(), autocast():
                model(**step.feed(model, batch))
        if number in looks:
            now = _swapped(adapters, start)
            yield f"{number} steps", taken()
            _swapped(adapters, now)


@torch.no_grad()
def _swapped(adapters: Mapping[str, torch.Tensor], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the adapters held, now that they hold ``values``."""
    held = [p.detach().clone() for p in adapters.values()]
    for parameter, value in zip(adapters.values(), values, strict=True):
        parameter.copy_(value)
    return held
