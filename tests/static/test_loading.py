"""The predicted peak while a model is loaded, against the storages of a real checkpoint's loading."""

import dataclasses
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from kbitcheck.backends.quantization import Quantization
from kbitcheck.models import load as loading
from kbitcheck.models.sources.local import Local
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.forecast.loading import JOINED, QUANTIZED, STORED, while_loading
from kbitcheck.observe.probes.live import Live
from kbitcheck.observe.probes.snapshot import snapshot


class OnDevice(Live):
    """Storages that would be on the device: nothing on the meta device, nothing that is read into the host's memory."""

    def add(self, tensor):
        if tensor.device.type != "meta":
            super().add(tensor)


def read_on_host(tensor, device=None, dtype=None):
    """transformers' own function, whose first line reads from the file into the host's memory."""
    with _disable_current_modes():
        tensor = tensor[...]
    return tensor.to(device=device, dtype=dtype)


def measured(folder, quant, dtype="bfloat16"):
    as_on_a_device = patch("transformers.core_model_loading._materialize_copy", read_on_host)
    # What is on a device is no view of a mapped file.
    with OnDevice() as live, as_on_a_device, patch.object(loading, "_leave_file"):
        model = loading.load(folder, quant, loading.Options(name="test", dtype=dtype))
    return live.peak, model


@pytest.mark.transformers5("Loads in another order")
@pytest.mark.parametrize("quant", ["nf4", "nf4,double", "int8"])
@pytest.mark.parametrize("recipe", ["llama", "gpt2", "mixtral"])
def test_the_peak_is_what_was_predicted(recipe, quant, tmp_path):
    source, wanted = resolve(f"tiny:{recipe}"), Quantization.parse(quant)
    # In float32, so that each tensor that is put on the device is another than the one that is read.
    with loading.quiet():
        loading.load(Path(source.checkpoint), None, loading.Options(name="test", dtype="float32")).save_pretrained(
            tmp_path
        )
    peak, _ = measured(tmp_path, wanted)
    model = dataclasses.replace(source, dtype="bfloat16").meta(wanted)
    facts = snapshot(model)
    forecast = while_loading(model, facts, stored=False, dtype=torch.bfloat16)
    # Buffers are counted from the start, and are made at the end; of joined tensors the one that comes last is not known.
    buffers = sum(t.nbytes for t in facts.buffers.values())
    order = max((t.nbytes for n, t in facts.parameters.items() if ".experts." in n), default=0)
    if (recipe, quant) == ("gpt2", "int8"):  # the host transposes, in two bytes a number, and frees it before packing
        peak -= max(t.nbytes for t in facts.parameters.values() if t.packed)
    scalars = 16 * len(facts.layers) + 2048
    assert peak - scalars <= forecast.peak <= peak + buffers + order + scalars
    assert forecast.how == (JOINED if recipe == "mixtral" else QUANTIZED)


def test_what_is_quantized_already_takes_no_more_than_it_weighs(tmp_path):
    source, wanted = resolve("tiny:llama"), Quantization.parse("nf4")
    source.load(wanted).save_pretrained(tmp_path)
    saved = resolve(str(tmp_path))
    assert isinstance(saved, Local)
    model = saved.meta(wanted)
    facts = snapshot(model)
    forecast = while_loading(model, facts, stored=True, dtype=torch.float32)
    assert forecast.how == STORED
    assert forecast.peak == pytest.approx(facts.nbytes, rel=0.1)
