"""What a GPU's allocator said of predictions, at full size (``make gpu``); and on a CPU that the measurement itself works."""

import json
from pathlib import Path

import pytest

from kbitcheck.judge.cost import LARGE_BLOCK
from kbitcheck.models.sources.resolve import resolve

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "fixtures" / "configs"
MEASURED = json.loads((ROOT / "results" / "gpu.json").read_text())["rows"]


def of_row(row, *marks):
    return pytest.param(row, id=f"{row['model']}-{row['quant']}", marks=marks)


of_each_row = pytest.mark.parametrize("row", [*map(of_row, MEASURED)])


@pytest.mark.transformers5("what a model keeps in a step is predicted exactly for transformers 5 alone")
@pytest.mark.parametrize("row", [of_row(MEASURED[0]), *(of_row(r, pytest.mark.slow) for r in MEASURED[1:])])
def test_steps_are_still_predicted_to_peak_where_they_did(bench, row):
    (plan,) = (p for p in bench.PLANS if (Path(p.model).stem, p.quant) == (row["model"], row["quant"]))
    told = bench.predicted(resolve(plan.model, random_weights=True), plan, "cuda")
    assert {n: s["peak"] for n, s in row["measured"]["steps"].items()} == pytest.approx(told["steps"], rel=bench.CLOSE)
    assert (told["loaded"], told["upcast"]) == (row["predicted"]["loaded"], row["predicted"]["upcast"])


@of_each_row
def test_preparing_took_what_it_adds_and_gave_back_what_it_freed(bench, row):
    told, found = row["predicted"], row["measured"]
    assert found["loaded"] == told["loaded"]
    assert found["prepared"] == told["loaded"] + told["upcast"]
    assert found["preparing_peak"] <= found["prepared"] + told["largest"]
    cached = found["cached_after_preparing"]
    assert cached == bench.NOT_MEASURED or cached < LARGE_BLOCK


@of_each_row
def test_checkpointing_saved_memory_and_cost_time(row):
    steps = row["measured"]["steps"]
    for name in steps:
        mode, _, shape = name.partition(" ")
        if mode != "off":
            plain = steps[f"off {shape}"]
            assert steps[name]["peak"] < plain["peak"]
            assert steps[name]["seconds"] > plain["seconds"]


@pytest.mark.gpu
def test_checkpointing_saves_what_was_predicted_of_a_tiny_model(bench):
    """The library's own memory hides a tiny model; the difference that checkpointing makes does not."""
    row = bench.row(bench.Plan(str(CONFIGS / "smollm-135m.json"), "nf4", ((2, 512),)), "cuda")
    told, found = row["predicted"]["steps"], row["measured"]["steps"]
    for mode in ("reentrant", "non-reentrant"):
        saved = found["off 2 x 512"]["peak"] - found[f"{mode} 2 x 512"]["peak"]
        assert saved == pytest.approx(told["off 2 x 512"] - told[f"{mode} 2 x 512"], rel=bench.CLOSE)


@pytest.mark.transformers5("what a model keeps in a step is predicted exactly for transformers 5 alone")
@pytest.mark.parametrize("quant", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_measurement_works_without_a_gpu(bench, tmp_path, quant):
    config = json.loads((CONFIGS / "smollm-135m.json").read_text())
    sizes = {"num_hidden_layers": 3, "vocab_size": 512, "hidden_size": 144, "intermediate_size": 288}
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes}))
    row = bench.row(bench.Plan(str(tmp_path), quant, ((2, 32),), rank=4), "cpu")
    assert row["worst_percent"] < 2
    found, told = row["measured"], row["predicted"]
    assert found["prepared"] == told["loaded"] + told["upcast"]
    assert found["preparing_peak"] <= found["prepared"] + told["largest"]
    steps = found["steps"]
    assert steps["reentrant 2 x 32"]["peak"] < steps["off 2 x 32"]["peak"]
