"""Images and audio of predicted steps, against measured ones on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kbitcheck_reference import prepare_model_for_kbit_training

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.forecast import feed, predict
from kbitcheck.observe.forecast.fake_tensors import Counted, World
from kbitcheck.observe.forecast.integers import SIDE, has_numbers
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.probes import adapters, memory, step, switches
from kbitcheck.observe.probes.snapshot import snapshot

NF4 = Quantization.parse("nf4")
VISION, SPEECH = "image-text-to-text", "speech-seq2seq"
MEASURED = Runtime(device="cpu", keeps_output=True)  # as the probes measure
CUDA = Runtime(autocast=torch.bfloat16)


def training(source: Any, runtime: Runtime = MEASURED, **options: Any) -> predict.Training:
    spec = CaseSpec(model=source.name, quant="nf4", implementation="none", device=runtime.device, **options)
    model = source.meta(NF4)
    return predict.Training(source, model, snapshot(model), spec, runtime)


def said(pixels: int, tokens: str) -> str:
    return f"each sequence has an image of {pixels} × {pixels} pixels, {tokens}, beside its text"


KINDS = {
    f"{VISION}/qwen2_vl": said(
        32, "4 tokens"
    ),  # a sequence of patches, by a grid; positions are of a text and of a grid
    f"{VISION}/qwen2_5_vl": said(32, "4 tokens"),  # attention within windows
    f"{VISION}/gemma3": said(16, "4 tokens"),  # a mask in which an image's tokens see each other
    f"{VISION}/idefics3": said(16, "1 token"),  # a list of tiles, padding among them
    f"{VISION}/llava_next": said(16, "10 tokens"),  # a tile beside the whole
    f"{VISION}/mllama": "each sequence has an image of 16 × 16 pixels beside its text",  # read by cross-attention
    f"{SPEECH}/voxtral": "each sequence has audio of 256 frames, 64 tokens, beside its text",
    f"{SPEECH}/whisper": "each sequence has audio of 256 frames and its text as labels",
}


@pytest.mark.transformers5("the families are of transformers 5")
@pytest.mark.parametrize("name", KINDS)
def test_a_step_with_images_or_audio_holds_what_was_predicted(name: str) -> None:
    source = resolve(f"arch:{name}")
    model = source.load(NF4)
    made = source.batch(model, batch=2, seq_len=24)
    prepare_model_for_kbit_training(model, True, {"use_reentrant": False})
    targets = adapters.target_layers(model, "all-linear")
    wrapped, owned = adapters.attach(model, targets, library="reference", rank=4, seed=0)
    step.train_step(wrapped, made, owned)
    measured = memory.activations(wrapped, made, seed=0)
    with switches.checkpointing_off(wrapped):
        peak = memory.measure(wrapped, made, 0).peak
    predicted = training(source, checkpointing="non-reentrant", rank=4, image_size=32)
    plain, held = predicted.step(2, 24, "off"), predicted.step(2, 24, "non-reentrant")
    assert (plain.held, held.held) == (measured.plain, measured.held)
    assert (plain.peak, held.peak) == (peak, measured.peak)
    assert predicted.notes == (KINDS[name],)


@pytest.mark.transformers5("the families are of transformers 5")
@pytest.mark.parametrize("name", [f"{VISION}/qwen2_5_vl", f"{VISION}/gemma4"])
def test_what_fits_with_images_is_confirmed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By steps in which every block runs; those of Qwen2.5-VL that attend beyond their windows are called otherwise."""
    source = resolve(f"arch:{name}")
    thinned = training(source, CUDA, image_size=32, attention="sdpa")
    monkeypatch.setattr(predict, "thin", lambda model: None)
    whole = training(source, CUDA, image_size=32, attention="sdpa")
    search, room = thinned.search(thinned.limit), 5 * thinned.step(2, 24, "reentrant").peak
    batch, longest = search.largest_batch(24, room, "reentrant"), search.longest(room, "reentrant")

    def peak(rows: int, length: int) -> int:
        return whole.step(rows, length, "reentrant", padded=False).peak

    assert 1 < batch.number < 100
    assert batch.peak == peak(batch.number, 24) <= room < peak(batch.number + 1, 24)
    assert longest.peak == peak(1, longest.number) <= room
    assert longest.number == thinned.limit if longest.limit == "model" else room < peak(1, longest.number + 1)


@pytest.mark.transformers5("the families are of transformers 5")
def test_a_larger_image_is_more_tokens_and_more_bytes() -> None:
    small, large = (training(resolve(f"arch:{VISION}/qwen2_vl"), image_size=n) for n in (32, 70))
    assert small.notes == (said(32, "4 tokens"),)
    assert large.notes == (said(64, "16 tokens"),)  # whole squares of patches
    assert small.limit - large.limit == 12
    assert small.step(1, 24, "off").peak < large.step(1, 24, "off").peak


@pytest.mark.transformers5("the families are of transformers 5")
def test_images_that_no_layout_fits_are_left_out_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "images_in_text", lambda model, width: ())
    monkeypatch.setattr(feed, "images_beside_text", lambda model, width: ())
    predicted = training(resolve(f"arch:{VISION}/gemma3"))
    name = "Gemma3ForConditionalGeneration"
    assert predicted.notes == (
        f"activations of text alone: {name} takes its images in no form that kbitcheck supports",
    )
    assert predicted.step(1, 24, "off").peak > 0


def test_integers_have_numbers_and_floats_have_none() -> None:
    world = World()
    with world.mode:
        floats = torch.empty(2, 3)
    with world.mode, Counted([], results=world.results, numbers=True):
        places = torch.arange(3)
        assert (places + 1).tolist() == [1, 2, 3]
        assert floats[torch.tensor([True, False])].shape == (1, 3)
        assert floats[:, places > 0].shape == (2, 2)
        assert torch.where(places > 0)[0].tolist() == [1, 2]
        assert (floats == 0.0).sum().item() == 0
        assert not has_numbers(places * floats[0])
        wide = torch.arange(SIDE + 1)
        assert not has_numbers(wide[None] <= wide[:, None])  # a mask of all by all, which may take all memory
