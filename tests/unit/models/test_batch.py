from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core import machine
from kbitcheck.core.errors import UsageError
from kbitcheck.models.inputs.choose import training_batch
from kbitcheck.models.inputs.text import IGNORED, LENGTH, SHORT, draw, first_rows, fit, usual_length
from kbitcheck.models.sources import recipe
from kbitcheck.models.sources.resolve import resolve

NF4 = Quantization()


def load(name: str) -> Any:
    return resolve(f"tiny:{name}").load(NF4)


@pytest.mark.parametrize("name", sorted(set(recipe.names()) - {"bert", "whisper", "deep", "wide"}))
def test_text_is_ragged_and_labels_follow_the_mask(name: str) -> None:
    made = resolve(f"tiny:{name}").batch(load(name))
    mask = made["attention_mask"].bool()
    assert mask[0].all()
    assert not mask[1].all()
    assert bool((mask.int().diff(dim=1) <= 0).all()), "padded on the right"
    assert (made["labels"] != IGNORED).any(1).all()
    assert (made["labels"][1] == IGNORED).any()
    assert all(len(set(row[row != IGNORED].tolist())) > 3 for row in made["labels"])
    if name != "t5":
        kept = made["labels"] != IGNORED
        assert torch.equal(made["labels"][kept], made["input_ids"][kept])
        assert not (kept & ~mask).any()


def test_special_tokens_are_not_drawn() -> None:
    model = load("llama")
    made = draw(model, batch=8, seq_len=200, seed=0)
    assert not set(made["input_ids"][made["attention_mask"].bool()].tolist()) & {0, 1, 2}
    assert set(made["input_ids"][~made["attention_mask"].bool()].tolist()) == {0}


def test_sizes_are_the_recipes_or_the_callers() -> None:
    model, source = load("llama"), resolve("tiny:llama")
    assert source.batch(model)["input_ids"].shape == (2, 24)
    made = source.batch(model, batch=1, seq_len=7)
    assert made["input_ids"].shape == (1, 7)
    assert made["attention_mask"].all()


@pytest.mark.parametrize(
    ("shape", "first"),
    [((4, 5), (2, 5)), ((16, 5), (8, 5)), ((1, 16, 3), (1, 8, 3)), ((1, 3, 2, 64), (1, 3, 2, 32))],
    ids=["rows", "patches", "patches of all images", "a strip"],
)
def test_the_first_rows_come_with_their_images(shape: tuple[int, ...], first: tuple[int, ...]) -> None:
    batch = {"input_ids": torch.zeros(4, 7), "pixel_values": torch.arange(torch.Size(shape).numel()).view(shape)}
    made = first_rows(batch, 2)
    assert made["input_ids"].shape == (2, 7)
    assert made["pixel_values"].shape == first
    assert made["pixel_values"].flatten()[0] == 0
    assert first_rows(batch, 9).keys() == batch.keys()


def test_image_tokens_match_the_patches() -> None:
    model = load("llava")
    made = resolve("tiny:llava").batch(model)
    image = made["input_ids"] == model.config.image_token_id
    assert image.sum(1).tolist() == [9, 9]
    assert (made["labels"][image] == IGNORED).all()
    assert made["pixel_values"].shape == (2, 3, 24, 24)


def test_speech_has_features_of_every_frame_and_varied_labels() -> None:
    made = resolve("tiny:whisper").batch(load("whisper"))
    assert made["input_features"].shape == (2, 20, 48)
    assert (made["labels"][0] != IGNORED).all()
    assert (made["labels"][1] == IGNORED).any()


def test_floating_inputs_follow_the_convolution_and_lose_nothing() -> None:
    model = load("whisper")
    made = resolve("tiny:whisper").batch(model)
    assert made["input_features"].dtype == torch.bfloat16
    model.model.encoder.conv1.float()
    wide = fit(made, model)
    assert wide["input_features"].dtype == torch.float32
    assert wide["labels"].dtype == torch.int64
    assert torch.equal(wide["input_features"], draw(model, batch=2, seq_len=16, seed=0)["input_features"])
    assert torch.equal(wide["input_features"], wide["input_features"].half().float())


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({}, torch.tensor([0, 1])),
        ({"num_labels": 1}, None),
        ({"problem_type": "multi_label_classification"}, None),
    ],
)
def test_classes_vary(changes: dict[str, Any], labels: torch.Tensor | None) -> None:
    model = load("bert")
    for key, value in changes.items():
        setattr(model.config, key, value)
    made = draw(model, batch=2, seq_len=8, seed=0)["labels"]
    assert len(set(made.flatten().tolist())) > 1
    if labels is not None:
        assert torch.equal(made, labels)
    elif changes.get("num_labels") == 1:
        assert made.shape == (2,)
    else:
        assert made.shape == (2, 5)


def test_masked_models_predict_some_tokens(tmp_path: Path) -> None:
    shelf = Path(recipe.__file__).parents[3] / "fixtures"
    path = tmp_path / "masked.toml"
    path.write_text((shelf / "bert.toml").read_text().replace("BertForSequenceClassification", "BertForMaskedLM"))
    source = resolve(str(path))
    model = source.load(NF4)
    made = source.batch(model)
    assert (made["labels"] != IGNORED).sum(1).tolist() == [8, 6]
    assert torch.isfinite(model(**made).loss)


def test_unknown_kinds_of_input_are_told() -> None:
    class Takes(torch.nn.Module):
        main_input_name = "pixels"

        def __init__(self, vision: object = None) -> None:
            super().__init__()
            text = SimpleNamespace(
                vocab_size=9, pad_token_id=None, eos_token_id=[1], to_dict=lambda: {"eos_token_id": [1]}
            )
            self.config = SimpleNamespace(get_text_config=lambda: text, to_dict=dict, vision_config=vision)

    class Pixels(Takes):
        def forward(self, pixels: object) -> None: ...

    class Images(Takes):
        def forward(self, pixel_values: object, input_ids: object) -> None: ...

    with pytest.raises(UsageError, match="Pixels takes pixels: no batch"):
        draw(Pixels(), batch=1, seq_len=4, seed=0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="its images come in a layout that kbitcheck does not support"):
        draw(Images(SimpleNamespace(patch_size=14)), batch=1, seq_len=4, seed=0)  # type: ignore[arg-type]


SHAPE = {"batch": 2, "seq_len": 24, "seed": 0}


@pytest.fixture
def llava_with_a_tower_that_raises() -> Any:
    """A function that loads tiny:llava, whose vision tower raises what it is given."""

    def fail(error: Exception) -> Any:
        def hook(module: Any, args: Any) -> None:
            raise error

        model = load("llava")
        model.model.vision_tower.register_forward_pre_hook(hook)
        return model

    return fail


def test_a_model_that_breaks_on_images_is_given_images(llava_with_a_tower_that_raises: Any) -> None:
    made = training_batch(llava_with_a_tower_that_raises(RuntimeError("broken")), **SHAPE)
    assert "pixel_values" in made


def test_running_out_of_memory_over_images_is_no_reason_for_text(llava_with_a_tower_that_raises: Any) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        training_batch(llava_with_a_tower_that_raises(torch.OutOfMemoryError("full")), **SHAPE)


def test_rows_of_a_large_model_are_short_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.Linear(4, 4)
    assert usual_length(linear) == LENGTH
    monkeypatch.setattr(machine, "LARGE_BYTES", 0)
    assert usual_length(linear) == SHORT
    assert usual_length(linear.to("meta")) == LENGTH
