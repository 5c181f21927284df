"""A caller's own model that is saved and loaded again computes by the same kernels, in each of its towers."""

from pathlib import Path

import pytest

from kbitcheck.backends.quantization import Quantization
from kbitcheck.models.sources.live import LiveModel
from kbitcheck.models.sources.resolve import resolve


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["tiny:llama", "tiny:llava"])
def test_a_reloaded_model_attends_as_before(name: str, attention: str, tmp_path: Path) -> None:
    model = resolve(name).load(Quantization.parse("nf4"))
    model.set_attn_implementation(attention)
    model.save_pretrained(tmp_path)
    again = LiveModel.of(model).reload(tmp_path)
    towers = ("", *type(model.config).sub_configs)
    assert len(towers) == (3 if name == "tiny:llava" else 1)
    for tower in towers:
        own, like = (getattr(config, tower) if tower else config for config in (again.config, model.config))
        assert own._attn_implementation == like._attn_implementation == attention
