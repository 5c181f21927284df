"""Peaks of shapes that were not run."""

import pytest
import torch

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.forecast import predict as forecast
from kbitcheck.observe.forecast.growth import Growth, shapes
from kbitcheck.observe.probes.snapshot import snapshot

# Highest at the first place for a few short sequences, at the second for many, at the third for long ones.
PLACES = torch.tensor([[9000, 1, 0, 10, 5, 0], [0, 0, 0, 90, 9, 0], [0, 0, 2, 0, 0, 0.5]], dtype=torch.float64)


def test_growth_goes_through_what_was_measured():
    true = Growth(PLACES)
    measured = {(b, n): [round(Growth(place[None]).peak(b, n)) for place in PLACES] for b, n in shapes(128)}
    found = Growth.through(128, measured)
    for shape in ((1, 16), (200, 16), (3, 4000)):
        assert found.peak(*shape) == pytest.approx(true.peak(*shape))
    assert len({int((PLACES @ terms(*shape)).argmax()) for shape in ((1, 16), (200, 16), (3, 4000))}) == 3


def terms(batch, length):
    alone = [1, length, length**2]
    return torch.tensor([*alone, *(batch * t for t in alone)], dtype=torch.float64)


def test_other_ways_of_a_step_are_compared_by_their_peaks():
    measured = {(b, n): [7, 100 * b] if b == 2 else [7, 8, 100 * b] for b, n in shapes(128)}
    assert Growth.through(128, measured).peak(5, 16) == pytest.approx(500)


def test_the_largest_that_fits_is_the_largest():
    growth, room = Growth(PLACES), 60_000
    batch = growth.largest_batch(128, room)
    assert growth.peak(batch, 128) <= room < growth.peak(batch + 1, 128)
    length = growth.longest(room, 10_000)
    assert growth.peak(1, length) <= room < growth.peak(1, length + 1)
    assert growth.longest(room, 100) == 100
    assert growth.largest_batch(128, 500) == growth.longest(500, 100) == 0


LOOKS = pytest.mark.transformers5("looks at numbers where it merges images")


@pytest.mark.parametrize(("recipe", "mode"), [("qwen3", "reentrant"), pytest.param("llava", "off", marks=LOOKS)])
def test_growth_foretells_other_shapes(recipe, mode):
    spec = CaseSpec(model=f"tiny:{recipe}", quant="nf4", implementation="none", device="cpu")
    source = resolve(spec.model)
    model = source.meta(Quantization.parse("nf4"))
    run = forecast.Training(source, model, snapshot(model), spec, device="cpu")
    growth = run.growth(24, mode)
    for shape in ((7, 24), (3, 100)):
        assert growth.peak(*shape) == pytest.approx(run.step(*shape, mode, padded=False).peak, rel=1e-6)
