from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models import load as loading
from kbitcheck.models import random_weights as drawing
from kbitcheck.models.sources.resolve import resolve

NF4 = Quantization()
Llama = Any


def plain_linears(model: nn.Module) -> set[str]:
    return {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Linear}


@pytest.mark.parametrize("quant", ["nf4,skip=q_proj", "int8,skip=q_proj+k_proj"])
def test_naming_modules_to_skip_keeps_the_automatic_ones(quant: str) -> None:
    wanted = Quantization.parse(quant)
    assert plain_linears(resolve("tiny:llama").load(wanted)) == {"lm_head", *wanted.skip}


def test_what_is_skipped_has_to_be_there() -> None:
    with pytest.raises(UsageError, match="skip=lm_haed: tiny:llama has no module of this name"):
        resolve("tiny:llama").load(Quantization.parse("nf4,skip=lm_haed"))


@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper", "opt"])
def test_tied_heads_are_skipped_automatically_too(name: str) -> None:
    source = resolve(f"tiny:{name}")
    norm = next(n for n, m in source.load(NF4).named_modules() if "norm" in type(m).__name__.lower())
    skipped: Any = source.load(Quantization.parse(f"nf4,skip={norm}"))  # which is not quantized in any case
    assert plain_linears(skipped) == plain_linears(source.load(NF4))
    assert skipped.get_output_embeddings().weight is skipped.get_input_embeddings().weight


def test_repacking_for_inference_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    source = resolve("tiny:llama")
    model = source.load(Quantization.parse("nf4,double"))
    layers: list[Any] = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = layers[0].weight.data.clone()
    with torch.no_grad():
        model(**source.batch(model))
    assert torch.equal(layers[0].weight.data, before)
    assert layers[0].weight.quant_state.nested


def test_local_directory_loads_in_its_dtype_or_the_callers(llama: Llama) -> None:
    source = resolve(str(llama()))
    assert (source.unquantized_dtype, source.quant) == ("bfloat16", None)
    assert source.load(NF4).dtype == torch.bfloat16
    assert resolve(str(llama()), dtype="fp32").load(NF4).dtype == torch.float32
    untold = resolve(str(llama(dtype=None, torch_dtype=None)))
    assert untold.unquantized_dtype == "bfloat16"
    assert untold.batch(source.load(NF4))["input_ids"].shape == (2, 24)


def test_sharded_directory_loads(tmp_path: Path) -> None:
    source = resolve("tiny:llama")
    whole = transformers.AutoModelForCausalLM.from_pretrained(source.checkpoint)
    whole.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert resolve(str(tmp_path)).load(NF4).config.num_hidden_layers == 4
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(UsageError, match="shards are absent"):
        resolve(str(tmp_path))


def test_quantized_checkpoints_keep_their_own_quantization(tmp_path: Path) -> None:
    own = "nf4,double,storage=bf16"
    resolve("tiny:llama").load(Quantization.parse(own)).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    assert source.quant == own
    assert type(source.load(Quantization.parse(own)).model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    for other in ("fp4,double,storage=bf16", "int8", "nf4", own + ",skip=q_proj"):
        with pytest.raises(UsageError, match="already quantized as nf4,double,storage=bf16"):
            source.load(Quantization.parse(other))


def test_quantized_checkpoint_of_a_skipped_module_takes_the_skip(tmp_path: Path) -> None:
    resolve("tiny:llama").load(Quantization.parse("int8,skip=q_proj")).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    assert source.quant == "int8,skip=lm_head+q_proj"
    for quant in ("int8", "int8,skip=q_proj"):
        assert plain_linears(source.load(Quantization.parse(quant))) == {"lm_head", "q_proj"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hidden_size": 96}, r"mismatched keys \(lm_head\.weight|size mismatch"),
        ({"num_hidden_layers": 5}, r"9 missing keys \(model\.layers\.4\.input_layernorm\.weight"),
        ({"architectures": ["FooForCausalLM"]}, "has no class FooForCausalLM"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel computes no loss"),
        ({"hidden_act": "foo"}, "cannot be loaded"),
        ({"model_type": "frobnicate"}, "knows no model type 'frobnicate'"),
    ],
)
def test_configurations_that_do_not_fit_the_weights_are_told(llama: Llama, fields: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        resolve(str(llama(**fields))).load(NF4)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_architecture_follows_from_the_type_where_none_is_named(llama: Llama) -> None:
    assert type(resolve(str(llama(architectures=None))).load(NF4)).__name__ == "LlamaForCausalLM"
    with pytest.raises(UsageError, match="has no class with a head for clip_vision_model"):
        loading.architecture(transformers.CLIPVisionConfig())
    with pytest.raises(UsageError, match="has no class"):
        loading.architecture(transformers.PretrainedConfig())


def test_first_of_several_mapped_classes_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = {transformers.LlamaConfig: (transformers.LlamaForCausalLM, None)}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "_model_mapping", mapping)
    assert loading.architecture(transformers.LlamaConfig()) is transformers.LlamaForCausalLM


def test_random_weights_are_drawn_for_a_configuration(llama: Llama) -> None:
    folder = llama(quantization_config={"quant_method": "gptq"})
    source = resolve(str(folder / "config.json"), random_weights=True)
    assert source.quant is None
    norm = source.load(NF4).model.norm.weight.detach()
    assert 0.05 < float(norm.float().std()) < 0.5
    (folder / "model.safetensors").write_bytes(b"never read")
    again = resolve(str(folder), random_weights=True).load(NF4).model.norm.weight
    assert torch.equal(again, norm)


def test_pickles_load_when_allowed_and_say_so_when_damaged(llama: Llama) -> None:
    folder = llama()
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="--allow-pickle"):
        resolve(str(folder))
    assert resolve(str(folder), allow_pickle=True).load(NF4).dtype == torch.bfloat16
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(UsageError, match="its pickle is damaged, or holds more than tensors"):
        resolve(str(folder), allow_pickle=True).load(NF4)


def test_remote_code_runs_only_when_trusted(llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = llama(auto_map={"AutoModelForCausalLM": "mine.Mine", "AutoModel": "mine.Mine"})
    (folder / "mine.py").write_text(
        "from transformers import LlamaForCausalLM\nclass Mine(LlamaForCausalLM):\n    told = 'mine'\n"
    )
    with pytest.raises(UsageError, match="--trust-remote-code"):
        resolve(str(folder))
    source = resolve(str(folder), trust_remote_code=True)
    assert source.remote_code
    model = source.load(Quantization.parse("nf4,skip=q_proj"))
    assert model.told == "mine"
    assert plain_linears(model) == {"lm_head", "q_proj"}


@pytest.mark.parametrize("debug", [True, False])
def test_loading_is_silent_except_for_debugging(
    debug: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KBITCHECK_DEBUG", "1" if debug else "")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    with warnings.catch_warnings(record=True) as seen, loading.quiet():
        if debug:
            warnings.simplefilter("always")
        logging.getLogger("transformers.x").error("noise")
        logging.getLogger("elsewhere").error("noise")
        warnings.warn("noise", UserWarning, stacklevel=1)
        assert transformers.utils.logging.is_progress_bar_enabled() is (debug and bars)
    assert bool(caplog.records) is debug
    assert [str(w.message) for w in seen] == (["noise"] if debug else [])
    assert transformers.utils.logging.is_progress_bar_enabled() is bars
    logging.getLogger("elsewhere").error("heard")
    assert caplog.records[-1].message == "heard"


def test_bars_that_were_off_stay_off() -> None:
    hf: Any = transformers.utils.logging
    bars = hf.is_progress_bar_enabled()
    hf.disable_progress_bar()
    try:
        with loading.quiet():
            pass
        assert not hf.is_progress_bar_enabled()
    finally:
        if bars:
            hf.enable_progress_bar()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("no memory"), UsageError("as it was")])
def test_running_out_of_memory_is_not_wrong_usage(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, loading.errors_as_usage("it"):
        raise error
    assert caught.value is error


def test_persistent_buffers_are_drawn_and_positive() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("clock", torch.zeros(3), persistent=False)
            self.config = SimpleNamespace(dtype=None)

        def tie_weights(self) -> None: ...

    with torch.device("meta"):
        model = Model()
    drawing.fill(model, drawing.Plan(name="it", seed="it", config={}, dtype="bfloat16"))  # type: ignore[arg-type]
    assert model.norm.running_var is not None
    assert (model.norm.running_var > 0).all()
    assert model.norm.weight.dtype == torch.bfloat16
    assert model.clock.is_meta


def test_norms_with_an_offset_are_told_by_what_they_do() -> None:
    class Offset(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (1 + self.weight)

    class Greedy(nn.RMSNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return x * gate * (1 + self.weight)

    assert drawing._adds_one(Offset(4))
    assert not drawing._adds_one(nn.RMSNorm(4))
    assert not drawing._adds_one(nn.LayerNorm(4))
    assert not drawing._adds_one(Greedy(4))


def test_a_lost_checkpoint_is_drawn_again(tmp_path: Path) -> None:
    import shutil

    source = resolve("tiny:bert")
    shutil.rmtree(source.checkpoint)
    assert json.loads((source.checkpoint / "config.json").read_text())["model_type"] == "bert"


PEAK = """
import resource, sys
from kbitcheck.backends.quantization import Quantization
from kbitcheck.models.sources.resolve import resolve
model = resolve(sys.argv[1], random_weights=True).load(Quantization())
print(model.num_parameters(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.transformers5("before, weights are read from files alone, so that all are drawn first")
def test_a_model_of_1_1b_float32_parameters_is_never_there_unquantized() -> None:
    config = Path(__file__).parents[3] / "fixtures" / "configs" / "tinyllama-1.1b.json"
    ran = subprocess.run([sys.executable, "-c", PEAK, str(config)], capture_output=True, text=True, check=True)
    parameters, peak = map(int, ran.stdout.split())
    assert parameters == 1_100_048_384
    # Interpreter, torch and transformers included, and the tensors that transformers loads at a time.
    assert peak < 4 << 30 < 4 * parameters
