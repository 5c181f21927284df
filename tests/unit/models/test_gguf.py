"""GGUF files, whose numbers come back dequantized."""

import numpy as np
import pytest
import torch

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.config import Config
from kbitcheck.models.sources.resolve import resolve

gguf = pytest.importorskip("gguf")

WIDTH, INNER, VOCABULARY = 64, 96, 320
NORMS = ("attn_norm", "ffn_norm")
LAYERS = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


def written(path, drawn=None):
    """A Llama of two blocks, its matrices as Q8_0; returns the path."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_vocab_size(VOCABULARY)

    def add(name, shape):
        numbers = generator.standard_normal(shape).astype(np.float32) / 8
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        if drawn is not None:
            drawn[name] = numbers
        writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)

    add("token_embd.weight", (VOCABULARY, WIDTH))
    add("output.weight", (VOCABULARY, WIDTH))
    add("output_norm.weight", (WIDTH,))
    for block in range(2):
        for name in NORMS:
            add(f"blk.{block}.{name}.weight", (WIDTH,))
        for name, shape in LAYERS.items():
            add(f"blk.{block}.{name}.weight", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("in_a_directory", [True, False])
def test_it_is_dequantized_and_then_quantized(tmp_path, in_a_directory):
    drawn: dict[str, np.ndarray] = {}
    file = written(tmp_path / "m.gguf", drawn)
    source = resolve(str(tmp_path if in_a_directory else file), static="if-too-large")
    assert source.notes == ("GGUF was dequantized to bfloat16 and then quantized anew: m.gguf",)
    model = source.load(Quantization.parse("nf4"))
    assert not list(tmp_path.glob("*.safetensors"))
    assert model.model.layers[1].mlp.down_proj.quant_state.shape == (WIDTH, INNER)
    found, wanted = model.lm_head.weight, torch.from_numpy(drawn["output.weight"])
    assert found.dtype is torch.bfloat16
    # Q8_0 keeps 32 numbers to the 127th part of the largest, and bfloat16 eight bits of each.
    apart = (found.float() - wanted).abs().max()
    assert 0 < apart <= wanted.abs().max() * (0.5 / 127 + 2**-8)


def test_its_sizes_are_told_without_its_tensors(tmp_path):
    source = resolve(str(written(tmp_path / "m.gguf")), static="always")
    assert isinstance(source, Config)
    assert (source.loadable, source.foreign) == (False, "gguf")
    model = source.meta(Quantization.parse("nf4"))
    assert model.config.intermediate_size == INNER
    assert next(model.parameters()).is_meta


def test_one_of_several_has_to_be_named(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match="2 GGUF files: give one of them"):
        resolve(str(tmp_path))


def test_a_damaged_file_is_wrong_usage(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF not really")
    with pytest.raises(UsageError, match="cannot be loaded"):
        resolve(str(tmp_path / "m.gguf"))


def test_without_the_package_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("kbitcheck.models.sources.gguf.find_spec", lambda name: None)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UsageError, match=r"kbitcheck\[gguf\]"):
        resolve(str(tmp_path / "m.gguf"))
