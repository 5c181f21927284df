"""The meta device against the real thing: every tensor, dtype, tie and byte."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kbitcheck.backends.quantization import Quantization
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.forecast import weights
from kbitcheck.observe.probes.live import own_tensors
from kbitcheck.observe.probes.snapshot import snapshot

CONFIGS = Path(__file__).parents[2] / "fixtures" / "configs"

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_404_352,  # and 14,848 numbers of the routers' correction, which are buffers
    "llava-1.5-7b": 7_063_427_072,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm-135m": 134_515_008,
}

CELLS = [
    *[(recipe, quant, None) for recipe in ("llama", "gpt2", "t5", "mixtral") for quant in ("nf4", "int8")],
    ("llama", "nf4,double,storage=bf16", None),
    ("llama", "fp4,storage=fp32", "fp32"),
    ("llama", "nf4,skip=q_proj", "fp16"),
    ("gpt2", "nf4,double", None),
    ("t5", "fp4,double", "fp16"),
    ("llava", "nf4,double", None),
    ("whisper", "int8", None),
]


def described(facts):
    return {
        n: (t.cls, t.dtype, t.shape, t.nbytes, t.packed) for n, t in (*facts.parameters.items(), *facts.buffers.items())
    }


def storages(model):
    """Bytes of every storage of a real model, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in own_tensors(model)}.values())


def test_a_checkpoint_whose_head_is_its_own_weighs_what_loading_it_gives(tmp_path):
    """As T5 v1.1 and FLAN-T5 were saved; transformers 5 ties heads of the class, unless two tensors differ."""
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=1, vocab_size=96, feed_forward_proj="gated-gelu"
        )
    )
    model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 32))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": model.lm_head.weight.detach()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    config = {**json.loads((tmp_path / "config.json").read_text()), "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))

    wanted = Quantization.parse("nf4")
    expected = snapshot(resolve(str(tmp_path)).load(wanted))
    assert "lm_head.weight" in expected.parameters
    for source in (resolve(str(tmp_path)), resolve(str(tmp_path), static="always")):
        assert described(snapshot(source.meta(wanted))) == described(expected)
    drawn = resolve(str(tmp_path), random_weights=True)
    assert described(snapshot(drawn.meta(wanted))) == described(snapshot(drawn.load(wanted)))


@pytest.mark.parametrize(("recipe", "quant", "dtype"), CELLS)
def test_it_weighs_what_the_real_model_weighs(recipe, quant, dtype):
    source, wanted = resolve(f"tiny:{recipe}", dtype=dtype), Quantization.parse(quant)
    real, predicted = source.load(wanted), source.meta(wanted)
    facts, expected = snapshot(predicted), snapshot(real)
    assert described(facts) == described(expected)
    assert facts.ties() == expected.ties()
    assert {n: (la.scheme, la.in_features, la.out_features) for n, la in facts.layers.items()} == {
        n: (la.scheme, la.in_features, la.out_features) for n, la in expected.layers.items()
    }
    groups = weights.groups(predicted, facts)
    assert sum(g.nbytes for g in groups.values()) == storages(real)
    assert {n: g.state for n, g in groups.items()} == {n: g.state for n, g in weights.groups(real, expected).items()}


def test_a_checkpoint_saved_quantized_weighs_the_same(tmp_path):
    source, wanted = resolve("tiny:llama"), Quantization.parse("nf4,double")
    source.load(wanted).save_pretrained(tmp_path)
    saved = resolve(str(tmp_path))
    predicted, real = saved.meta(wanted), saved.load(wanted)
    total = sum(g.nbytes for g in weights.groups(predicted, snapshot(predicted)).values())
    assert total == storages(real)


@pytest.mark.parametrize("profile", ["peft", "qlora", "frozen-half"])
@pytest.mark.parametrize("recipe", ["llama", "gpt2", "t5", "mixtral"])
def test_upcasting_adds_what_the_profile_says(recipe, profile):
    model = resolve(f"tiny:{recipe}").meta(Quantization.parse("nf4"))
    facts = snapshot(model)
    added = sum(g.upcast.get(profile, 0) for g in weights.groups(model, facts).values())
    if profile == "peft":
        from kbitcheck_reference import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(model)
        assert added == snapshot(model).nbytes - facts.nbytes > 0
    elif profile == "qlora":
        norms = [m for n, m in model.named_modules() if "norm" in n.rpartition(".")[2] or ".ln_" in n]
        assert added == sum(p.nbytes for m in norms for p in m.parameters(recurse=False)) > 0
    else:
        assert added == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_has_its_published_size(name):
    model = resolve(str(CONFIGS / f"{name}.json"), static="always").meta(Quantization.parse("nf4"))
    facts = snapshot(model)
    groups = weights.groups(model, facts)
    assert sum(g.parameters for g in groups.values()) == PUBLISHED[name]
    unquantized = sum(2 * (g.parameters - g.quantized) for g in groups.values())
    width = 2 if json.loads((CONFIGS / f"{name}.json").read_text())["torch_dtype"] != "float32" else 4
    # Routers that a class keeps in float32, as DeepSeek's since transformers 5.24.
    kept = {n: p.numel() for n, p in model.named_parameters() if width == 2 and p.dtype is torch.float32}
    assert all(n.endswith("mlp.gate.weight") for n in kept)
    assert sum(g.unquantized for g in groups.values()) == unquantized * width // 2 + 2 * sum(kept.values())
    assert all(t.device == "meta" for t in facts.parameters.values())


@pytest.mark.transformers5("Mixtral's experts are quantized")
def test_mixtrals_experts_are_told_apart():
    model = resolve(str(CONFIGS / "mixtral-8x7b.json"), static="always").meta(Quantization.parse("nf4"))
    groups = weights.groups(model, snapshot(model))
    assert groups["experts"].parameters == 32 * 8 * 3 * 4096 * 14336
    assert groups["experts"].quantized == 0
    assert groups["experts"].upcast["peft"] == 2 * groups["experts"].parameters
    assert groups["routers"].parameters == 32 * 8 * 4096
    assert groups["attention"].quantized == groups["attention"].parameters == 32 * 4096 * (2 * 4096 + 2 * 1024)
    # A scale of four bytes for 64 numbers, and a table of 16 for each of 128 layers.
    assert groups["attention"].state == groups["attention"].parameters // 16 + 128 * 64
