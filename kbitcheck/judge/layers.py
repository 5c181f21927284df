"""KB303: the backward of each quantized layer, measured from outside it."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts, LayerBackward
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule
from kbitcheck.judge.attribution import unless_bare
from kbitcheck.judge.gradients import live_gradients

BARE_LAYER = "the library's own layer on the same weight, without hooks, does the same"


@rule("KB303", "layer-backward-exact", Level.MUST)
@unless_bare
def layer_backward_exact(facts: Facts) -> Iterable[Observation]:
    """Through each frozen quantized layer, dL/dx equals dL/dy times the unpacked weight, to rounding in the compute dtype.

    The gradient is judged element by element, and as a gain over the whole layer, from outside the layer. The rule
    also fails if the layer's input requires grad and its output does not. A module of experts that reads its packed
    weights unpacked is compared with its float64 twin, token by token, on the step's tokens, choices and gradient.

    A layer of at most 65,536 weights also runs on its own: on one row, on no rows, and on inputs and gradients that are
    transposed, strided, expanded or begin within their storage. It must return what it does for the same numbers in
    contiguous memory.

    Why: gradients of adapters do not show a cut here, because the residual stream carries gradients around the layer.
    Symptom: all adapters have gradients, those before the cut are several times too small, and the model is just
    worse.
    Fix: use a kernel that has a backward; never detach a frozen layer's input, and never run the layer under
    ``no_grad``. Call ``contiguous()`` on what goes to a kernel by its pointer.
    Sources: transformers#46736, GPTQModel#1435, AutoAWQ#324, bitsandbytes#2034, bitsandbytes#1995, bitsandbytes#1884.
    """
    live_gradients(facts)
    backwards = {**facts.layer_backwards, **facts.mixed_backwards}
    unjudged = {n: f"{n} was not judged: {layer.unjudged}" for n, layer in backwards.items() if layer.unjudged}
    if len(unjudged) == len(backwards):
        raise NotApplicable(" and ".join(unjudged.values()) or "no quantized layer ran, only what reads its weight")
    for name, why in unjudged.items():
        yield Observation(name, "dL/dy @ W", "not judged", ok=True, note=why)
    for name, layer in backwards.items():
        within = name.partition(" (")[0].removesuffix(".base_layer") + "."
        adapters = [g.live for n, g in facts.gradients.items() if n.startswith(within)]
        # Where no adapter is live, the model itself takes no gradient through it, in the float twin either: KB904 tells.
        if not layer.unjudged and (any(adapters) or not adapters):
            yield from _layer_backward(facts, name, layer, adapted=bool(adapters))


def _layer_backward(facts: Facts, name: str, layer: LayerBackward, *, adapted: bool) -> Iterable[Observation]:
    """What one layer's backward shows; ``adapted`` says that the layer has adapters that are to learn."""
    if not layer.carried:
        yield Observation(name, "output requires grad when the input does", "the gradient is cut", ok=False)
        return
    if not layer.reached:
        if adapted:
            yield Observation(name, "a gradient reaches the layer's output", "none does", ok=False)
        return
    actual = f"error {layer.excess:.3g} times its bound, gain {layer.gain:.5f} (may be off by {layer.gain_bound:.1e})"
    yield Observation(name, "dL/dy @ W", actual, ok=layer.excess <= 1 and abs(layer.gain - 1) <= layer.gain_bound)
    if layer.bent > layer.bent_bound:
        yield Observation(f"{name} (a large gradient)", "as many times as large", f"off by {layer.bent:.2g}", ok=False)
    if not layer.overflows:
        yield Observation(
            f"{name} (an infinite gradient)", "not finite, as a gradient scaler needs it", "finite", ok=False
        )
    for layout in layer.layouts:
        where = f"{name} ({layout.what})"
        seen = Observation(where, "as of the same numbers in contiguous memory", layout.actual, ok=False)
        yield (
            seen
            if not layout.bare
            else dataclasses.replace(seen, party=Party.STACK, witness=BARE_LAYER, traits=_traits(name, facts))
        )
    if layer.misread:
        yield Observation(
            f"{name} (unpacked by the stack)",
            "the weight that the packed bytes stand for",
            f"off by {layer.misread:.1%}",
            ok=False,
            party=Party.STACK,
            witness="the bare layer's own dequantization differs from its format; the layer is judged by it",
            traits=_traits(name, facts),
        )


def _traits(name: str, facts: Facts) -> dict[str, Any] | None:
    """What the condition of a finding may ask of a quantized layer."""
    layer = facts.wrapped.layers.get(name.partition(" (")[0])
    return None if layer is None else {"columns": layer.in_features, "dtype": layer.compute}
