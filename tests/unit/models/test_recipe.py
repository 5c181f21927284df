from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources import recipe
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.run import suites as suite

RECIPES = recipe.names()
NF4, INT8 = Quantization(), Quantization("int8")
TOWERS = {
    "bert": ["bert.encoder.layer"],
    "gemma": ["model.layers"],
    "gpt-oss": ["model.layers"],
    "gpt2": ["transformer.h"],
    "llama": ["model.layers"],
    "llava": [r"model.vision_tower(\.vision_model)?\.encoder\.layers", "model.language_model.layers"],
    "mixtral": ["model.layers"],
    "opt": ["model.decoder.layers"],
    "qwen3": ["model.layers"],
    "qwen3-moe": ["model.layers"],
    "deep": ["model.layers"],
    "wide": ["model.layers"],
    "t5": ["encoder.block", "decoder.block"],
    "whisper": ["model.encoder.layers", "model.decoder.layers"],
}
FINGERPRINTS = """
import hashlib
from safetensors.torch import load_file
from kbitcheck.models.sources import recipe
from kbitcheck.models.sources.resolve import resolve
found = {}
for name in recipe.names():
    tensors = load_file(resolve("tiny:" + name).checkpoint / "model.safetensors")
    numbers = b"".join(key.encode() + tensor.double().numpy().tobytes() for key, tensor in sorted(tensors.items()))
    found[name] = hashlib.sha256(numbers).hexdigest()
print(found)
"""


def load(name: str, quant: Quantization = NF4) -> Any:
    return resolve(f"tiny:{name}").load(quant)


def floating(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Parameters outside quantized layers, with their owners."""
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(parameter, Params4bit | Int8Params):
            yield owner, name, parameter


def test_recipes_run_plain_attention_and_experts() -> None:
    config = load("mixtral").config
    assert config._attn_implementation == "eager"
    assert getattr(config, "_experts_implementation", "eager") == "eager"


def test_suite_and_shelf_hold_the_same_recipes() -> None:
    beside = {model.removeprefix("tiny:") for model, _, _ in suite.LARGEST}
    assert sorted({*suite.RECIPES, *beside}) == RECIPES
    assert {model.removeprefix("tiny:") for model, _, _ in suite.suite_cells("full")} == set(RECIPES)


def test_the_deep_recipe_is_deep_and_has_a_large_vocabulary() -> None:
    model = load("deep")
    assert len(model.model.layers) == 32
    assert model.config.vocab_size > 32_768


def test_the_wide_recipe_is_wide() -> None:
    """In all, in one weight, and in a block's input on the longest batch that a case draws."""
    model = resolve("tiny:wide").meta(None)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert sum(sizes) > 10_000_000
    assert max(sizes) > 1_000_000
    assert 512 * model.config.hidden_size * 2 > 1_000_000


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("quant", [NF4, INT8], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_a_training_step_gives_finite_gradients(name: str, quant: Quantization) -> None:
    source = resolve(f"tiny:{name}")
    model: Any = source.load(quant)
    assert not model.training
    model.train()
    loss = model(**source.batch(model)).loss
    loss.backward()
    assert torch.isfinite(loss)
    gradients = {n: p.grad for _, n, p in floating(model) if p.grad is not None}
    assert len(gradients) > 5
    assert all(torch.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_deep_drawn_and_not_uniform(name: str) -> None:
    source = resolve(f"tiny:{name}")
    model: Any = source.load(NF4)
    for tower in TOWERS[name]:
        (blocks,) = (module for path, module in model.named_modules() if re.fullmatch(tower, path))
        assert len(blocks) >= 3, tower
    for owner, parameter, values in floating(model):
        assert float(values.detach().float().std()) > 0.02, parameter
        if "norm" in type(owner).__name__.lower() and parameter.endswith("weight"):
            centre = 0.0 if "Gemma" in type(owner).__name__ else 1.0
            assert (values < centre).any(), parameter
            assert (values > centre).any(), parameter
            assert abs(float(values.detach().float().mean()) - centre) < 0.2, parameter
    with torch.no_grad():
        logits = model(**source.batch(model)).logits.float()
    assert torch.isfinite(logits).all()
    assert 0.5 < float(logits.std(-1).mean()) < 5


@pytest.mark.parametrize("name", RECIPES)
def test_heads_and_ties_stay_and_quantized_layers_are_many(name: str) -> None:
    model = load(name, INT8)
    quantized = [n for n, m in model.named_modules() if isinstance(m, Linear8bitLt)]
    assert len(quantized) >= 12
    assert not [n for n in quantized if n.endswith(("lm_head", "proj_out", "classifier", ".wo"))]


def test_quick_recipes_own_a_float32_parameter_and_a_buffer() -> None:
    for name in {model for model, _, _ in suite.QUICK}:
        model = resolve(name).load(NF4)
        assert any(p.dtype == torch.float32 for _, _, p in floating(model)), name
        assert any(p.dtype != torch.float32 for _, _, p in floating(model)), name
        assert any(b.is_floating_point() for b in model.buffers()), name


def test_float32_parameters_hold_what_half_precision_cannot() -> None:
    for name in ("llama", "gpt2", "llava", "t5"):
        wide = [p for _, _, p in floating(load(name)) if p.dtype == torch.float32]
        assert all(not torch.equal(p, p.half().float()) and not torch.equal(p, p.bfloat16().float()) for p in wide)


def test_t5_keeps_wo_in_float32_and_opt_is_half() -> None:
    t5 = load("t5")
    assert {p.dtype for _, n, p in floating(t5) if n.endswith("wo.weight")} == {torch.float32}
    assert {p.dtype for _, n, p in floating(t5) if not n.endswith("wo.weight")} == {torch.float16}
    assert {p.dtype for _, _, p in floating(load("opt"))} == {torch.float16}


def test_blocks_are_not_all_full() -> None:
    for name in ("llama", "gpt2", "llava", "t5"):
        layers: list[Any] = [m for m in load(name).modules() if isinstance(m, Linear4bit)]
        assert any(m.weight.quant_state.shape.numel() % m.weight.quant_state.blocksize for m in layers), name


def test_loads_are_fresh_and_leave_the_global_generator_alone() -> None:
    source = resolve("tiny:gpt2")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load("gpt2")
    batch = source.batch(first)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        first.get_input_embeddings().weight.zero_()
    assert load("gpt2").get_input_embeddings().weight.any()
    assert all(torch.equal(batch[k], again) for k, again in source.batch(first).items())
    assert not torch.equal(batch["input_ids"], source.batch(first, seed=1)["input_ids"])


def test_every_process_draws_the_same_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(FINGERPRINTS, {})
    here = capsys.readouterr().out
    there = subprocess.run(
        [sys.executable, "-c", FINGERPRINTS],
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout == here
    assert len(set(ast.literal_eval(here).values())) == len(RECIPES)
    assert not list(tmp_path.iterdir())


def test_saved_model_reloads_with_the_same_logits(tmp_path: Path) -> None:
    source = resolve("tiny:gpt2")
    model: Any = source.load(Quantization.parse("nf4,double,storage=bf16"))
    model.save_pretrained(tmp_path)
    again: Any = source.reload(tmp_path)
    batch = source.batch(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_recipe_file_is_a_model_of_its_own(tmp_path: Path) -> None:
    shelf = Path(recipe.__file__).parents[3] / "fixtures"
    path = tmp_path / "mine.toml"
    path.write_text((shelf / "qwen3.toml").read_text().replace("num_hidden_layers = 3", "num_hidden_layers = 5"))
    mine = resolve(str(path), dtype="fp16")
    model: Any = mine.load(Quantization.parse("nf4,skip=o_proj"))
    assert model.config.num_hidden_layers == 5
    assert model.dtype == torch.float16
    left = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Linear}
    assert left == {"lm_head", "o_proj"}
    other = load("qwen3")
    assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)


CONFIG = 'architecture = "LlamaForCausalLM"\n[config]\nmodel_type = "llama"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("= 3", "is not a recipe"),
        ("\x00", "is not a recipe"),
        ("", "needs architecture, config"),
        ('architecture = "A"', "needs config"),
        ('architecture = "A"\n[config]\nvocab_size = 3', r"needs config\.model_type"),
        ("layers = 3\n" + CONFIG, "unknown field 'layers'; known: about, architecture"),
        ('batch = "2"\n' + CONFIG, "batch must be int, not str"),
        ("batch = true\n" + CONFIG, "batch must be int, not bool"),
        ("batch = 0\n" + CONFIG, "batch must be at least 1"),
        ("seq_len = -1\n" + CONFIG, "seq_len must be at least 1"),
        ('dtype = "int4"\n' + CONFIG, "unknown dtype 'int4'"),
        (CONFIG + "[unread.modules]\n", "unread may hold parameters and buffers"),
    ],
)
def test_broken_recipe_files_are_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=told) as caught:
        resolve(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "frobnicate"}, "knows no model type 'frobnicate'"),
        ({"model_type": "lama"}, r"did you mean llama\?"),
        ({"num_attention_heads": "many"}, "cannot be loaded"),
        ({"architectures": ["Llama4Banana"]}, "has no class Llama4Banana"),
        ({"architectures": ["LlamaModel"]}, "computes no loss"),
    ],
)
def test_recipes_that_transformers_refuses_are_told(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "vocab_size": 32,
    } | change
    name = config.pop("architectures", ["LlamaForCausalLM"])[0]
    path = tmp_path / "r.toml"
    path.write_text(
        f'architecture = "{name}"\n[config]\n' + "".join(f"{k} = {json.dumps(v)}\n" for k, v in config.items())
    )
    with pytest.raises(UsageError, match=told) as caught:
        resolve(str(path)).load(NF4)
    assert "\n" not in str(caught.value)


def test_a_model_does_not_name_the_package_that_drew_it() -> None:
    config = load("gpt2").config
    assert config.name_or_path
    assert "kbitcheck" not in config.name_or_path
