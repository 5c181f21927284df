"""What the allocator says of predictions, at full size; and on a CPU that the measurement itself works."""

import json
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "fixtures" / "configs"
SEGMENT = 20 << 20  # what the allocator takes for tensors from 1 to 10 MiB at once, and may not fill


@pytest.fixture(scope="module")
def rows(bench):
    """A row of measurements by model and quantization, each made once."""
    made = {}

    def row(model, quant):
        if (model, quant) not in made:
            (plan,) = (p for p in bench.PLANS if Path(p.model).stem == model and p.quant == quant)
            made[model, quant] = bench.row(plan, "cuda")
        return made[model, quant]

    return row


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "quant"), [("tinyllama-1.1b", "nf4"), ("llama-2-7b", "nf4"), ("llama-2-7b", "int8")])
def test_steps_peak_where_they_were_predicted_to(bench, rows, model, quant):
    row = rows(model, quant)
    for name, peak in row["predicted"]["steps"].items():
        assert row["measured"]["steps"][name]["peak"] == pytest.approx(peak, rel=bench.CLOSE), name


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "quant"), [("tinyllama-1.1b", "nf4"), ("llama-2-7b", "nf4"), ("llama-2-7b", "int8")])
def test_preparing_takes_what_it_adds_and_gives_back_what_it_frees(rows, model, quant):
    row = rows(model, quant)
    told, found = row["predicted"], row["measured"]
    assert found["loaded"] == told["loaded"]
    assert found["prepared"] == told["loaded"] + told["upcast"]
    assert found["preparing_peak"] <= found["prepared"] + told["largest"]
    assert found["cache_left"] < SEGMENT


@pytest.mark.gpu
def test_checkpointing_saves_what_was_predicted_of_a_tiny_model(bench):
    """The library's own memory hides a tiny model; the difference that checkpointing makes does not."""
    row = bench.row(bench.Plan(str(CONFIGS / "smollm-135m.json"), "nf4", ((2, 512),)), "cuda")
    told, found = row["predicted"]["steps"], row["measured"]["steps"]
    for mode in ("reentrant", "non-reentrant"):
        saved = found["off 2 x 512"]["peak"] - found[f"{mode} 2 x 512"]["peak"]
        assert saved == pytest.approx(told["off 2 x 512"] - told[f"{mode} 2 x 512"], rel=bench.CLOSE)


@pytest.mark.transformers5("what a model keeps in a step is predicted exactly for transformers 5 alone")
@pytest.mark.parametrize("quant", ["nf4", "int8"])
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
