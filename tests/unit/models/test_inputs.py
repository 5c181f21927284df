"""Every layout of inputs is tried on the model itself, and the first it computes a finite loss from is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kbitcheck.backends.quantization import Quantization
from kbitcheck.models.inputs import choose as inputs
from kbitcheck.models.inputs.text import first_rows
from kbitcheck.models.sources.live import LiveModel
from kbitcheck.models.sources.resolve import resolve

NF4 = Quantization()
SHAPE: dict[str, Any] = {"batch": 2, "seq_len": 8, "seed": 0}


def since_5(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.transformers5("transformers 4 shrinks or feeds it otherwise"))


@pytest.mark.parametrize(
    ("name", "images", "audio", "fed"),
    [
        since_5("arch:image-text-to-text/qwen2_vl", True, False, "text, images"),  # patches in a row
        ("arch:image-text-to-text/llava_next", True, False, "text, images"),  # a list of images for each row
        since_5("arch:image-text-to-text/vision-encoder-decoder", True, False, "images"),  # no text but the labels
        ("tiny:whisper", False, True, "audio"),  # mel bins by frames
        ("arch:speech-seq2seq/speech_to_text", False, True, "audio"),  # frames by mel bins
        since_5("arch:speech-seq2seq/moonshine", False, True, "audio"),  # a wave
        since_5("arch:speech-seq2seq/voxtral", False, True, "text, audio"),  # tokens that stand for audio
        since_5("arch:speech-seq2seq/vibevoice_asr", False, True, "text, audio"),  # a wave of one channel, in chunks
        since_5("arch:speech-seq2seq/voxtral_realtime", False, True, "text, audio"),  # added to a text as long
        since_5("arch:speech-seq2seq/qwen3_asr", False, True, "text, audio"),  # whole windows
        since_5("arch:speech-seq2seq/kyutai_speech_to_text", False, True, "text"),  # a token of each codebook
        since_5("arch:speech-seq2seq/dia", False, True, "text"),  # the decoder's inputs too
        ("tiny:llama", False, False, "text"),
        ("tiny:llama", True, True, "text"),  # nothing to see or hear with
    ],
)
def test_a_model_is_fed_what_it_takes(name: str, images: bool, audio: bool, fed: str) -> None:
    model = resolve(name).load(NF4)
    before = [p.data_ptr() for p in model.parameters()]
    batch = inputs.first_fitting(model, **SHAPE, images=images, audio=audio)
    assert inputs.kinds(batch) == fed
    assert [p.data_ptr() for p in model.parameters()] == before
    assert not model.training
    assert bool(torch.isfinite(model.train()(**batch).loss))


# A family for each layout of images.
LAYOUTS = {
    "qwen2_vl": (32, 384),
    "blip": (2, 3, 16, 16),
    "idefics3": (2, 1, 3, 16, 16),
    "llava_next": (2, 2, 3, 16, 16),
    "kimi_k25": (32, 3, 8, 8),
    "minicpmv4_6": (1, 3, 8, 256),
    "inkling2": (8, 16, 16, 3),
    "inkling_mm_model": (8, 2, 2, 2, 3),
    "gemma4": (2, 36, 192),
    "mllama": (2, 1, 4, 3, 16, 16),
}


@pytest.mark.transformers5("the families are of transformers 5")
@pytest.mark.parametrize(("kind", "shape"), LAYOUTS.items(), ids=list(LAYOUTS))
def test_images_come_in_the_layout_the_model_reads_and_a_row_keeps_its_own(kind: str, shape: tuple[int, ...]) -> None:
    source = resolve(f"arch:image-text-to-text/{kind}")
    model = source.load(NF4)
    batch = source.batch(model)
    assert tuple(batch["pixel_values"].shape) == shape
    with torch.no_grad():
        whole, first = (model(**fed).logits.float() for fed in (batch, first_rows(batch, 1)))
        batch["pixel_values"] = -batch["pixel_values"]
        other = model(**batch).logits.float()
    assert torch.allclose(whole[:1], first, atol=0.05 * float(whole.std()))
    assert not torch.equal(whole, other)


@pytest.mark.transformers5("the families are of transformers 5")
@pytest.mark.parametrize(
    "name",
    [
        "arch:image-text-to-text/qwen2_vl",  # whose configuration states no size of images
        "arch:image-text-to-text/llava_next",  # whose images are no plain ones
        "arch:image-text-to-text/vision-encoder-decoder",  # which takes no text
        "arch:speech-seq2seq/moonshine",  # which takes a wave
    ],
)
def test_a_directory_and_a_live_model_are_fed_as_their_architecture_is(name: str) -> None:
    architecture = resolve(name)
    directory = resolve(str(architecture.checkpoint))
    model = directory.load(NF4)
    state = torch.get_rng_state()
    fed, live, wanted = (source.batch(model) for source in (directory, LiveModel.of(model), architecture))
    assert torch.equal(torch.get_rng_state(), state)
    assert fed.keys() == live.keys() == wanted.keys()
    assert all(torch.equal(fed[key], wanted[key]) and torch.equal(live[key], wanted[key]) for key in wanted)
    assert bool(torch.isfinite(model.train()(**fed).loss))


def test_images_that_are_not_read_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(nn.Module):
        config = SimpleNamespace(vision_config=SimpleNamespace(image_size=8, patch_size=4))
        base_model = None

        def forward(self, input_ids: Any = None, pixel_values: Any = None, labels: Any = None) -> Any:
            return SimpleNamespace(loss=torch.tensor(1.0), logits=torch.ones(2, 8, 4))

    def text(model: Any, *, images: bool = True, **_: Any) -> Any:
        ids = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
        return {**ids, "pixel_values": torch.ones(2, 3, 8, 8)} if images else ids

    monkeypatch.setattr(inputs, "draw", text)
    made = inputs.first_fitting(Blind(), **SHAPE, images=True, audio=False)  # type: ignore[arg-type]
    assert inputs.kinds(made) == "text"


class Fed(nn.Module):
    """Computes the loss that it is told to, or raises."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss
        self.config = SimpleNamespace()

    def forward(self, input_ids: Any = None, labels: Any = None) -> Any:
        if isinstance(self.loss, Exception):
            raise self.loss
        return SimpleNamespace(loss=self.loss)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (ValueError("not so"), "not so"),
        (torch.tensor(torch.nan), "Fed computes no finite loss"),
        (None, "Fed computes no finite loss"),
    ],
)
def test_a_model_that_takes_nothing_says_why(monkeypatch: pytest.MonkeyPatch, loss: Any, said: str) -> None:
    monkeypatch.setattr(inputs, "draw", lambda model, **_: {"input_ids": torch.zeros(2, 8, dtype=torch.long)})
    with pytest.raises(ValueError, match=said):
        inputs.first_fitting(Fed(loss), **SHAPE, images=False, audio=False)  # type: ignore[arg-type]


@pytest.mark.transformers5("transformers 4 loads it otherwise")
@pytest.mark.parametrize(
    "name",
    [
        "arch:masked-lm/fnet",  # the Fourier transform knows no bfloat16
        "arch:masked-lm/mobilebert",  # its head reads a quantized layer's packed weight
    ],
)
def test_what_runs_on_nothing_gets_what_its_float32_self_runs_on(name: str) -> None:
    source = resolve(name)
    model = source.load(NF4)
    batch = source.batch(model, **SHAPE)
    assert inputs.kinds(batch) == "text"
    with pytest.raises(RuntimeError):
        model.train()(**batch)


@pytest.mark.transformers5("transformers 4 loads it otherwise")
def test_noise_beside_dropout_is_off() -> None:
    noisy = resolve("arch:speech-seq2seq/speecht5").load(NF4).config
    assert (noisy.encoder_layerdrop, noisy.decoder_layerdrop, noisy.apply_spec_augment) == (0.0, 0.0, False)
    assert noisy.hidden_dropout > 0
    parts = resolve("arch:speech-seq2seq/speech-encoder-decoder").load(NF4).config
    assert (parts.encoder.layerdrop, parts.encoder.apply_spec_augment) == (0.0, False)
