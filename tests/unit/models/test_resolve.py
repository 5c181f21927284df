from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.resolve import resolve

Llama = Any


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("tiny:lama", r"\(did you mean tiny:llama\?\); there are bert, deep, gemma, gpt-oss, gpt2"),
        ("tiny:frobnicate", "no recipe tiny:frobnicate; there are bert"),
        ("tiny:", "there are bert"),
        ("tiny:../fixtures/llama", "no recipe"),
        ("llama", r"did you mean tiny:llama\?"),
        ("tiny-llama", r"did you mean tiny:llama\?"),
        ("gpt2", r"did you mean tiny:gpt2\?"),
        ("", r"no such model ''; a model is a recipe"),
        ("./nothing", "no such model"),
        ("/no/such/dir", "no such model"),
        ("no/such/dir", "no such model"),
        ("fixtures/none.toml", "no such model"),
        ("none/config.json", "no such model"),
        ("a b", "no such model"),
        ("org/name", "neither a directory nor in the hub cache"),
    ],
)
def test_what_is_no_model_is_told(model: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        resolve(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "is an empty directory"),
        ({"notes.txt": ""}, r"is no model: it has no config\.json"),
        ({"adapter_config.json": "{}"}, "holds an adapter"),
        ({"config.json": ""}, "cannot be read as JSON"),
        ({"config.json": "{}"}, "states no model_type"),
        ({"config.json": '{"model_type": "llama"}'}, "has no weights; give --random-weights"),
        ({"config.json": '{"model_type": "llama"}', "pytorch_model.bin": ""}, "a pickle"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors": ""}, "truncated"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors": "\x02" + "\0" * 7 + "{}"}, "holds no tensors"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors.index.json": "{"}, "cannot be read as JSON"),
    ],
)
def test_directories_that_hold_no_model_are_told(tmp_path: Path, files: dict[str, str], told: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=told) as caught:
        resolve(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_files_that_are_no_model_are_told(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.touch()
    with pytest.raises(UsageError, match="is a file, but no recipe"):
        resolve(str(path))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float99", ""])
def test_unknown_dtypes_are_told(dtype: str) -> None:
    with pytest.raises(UsageError, match="use bf16, fp16, fp32"):
        resolve("tiny:llama", dtype=dtype)


def test_damaged_and_foreign_checkpoints_are_told(llama: Llama) -> None:
    folder = llama(quantization_config={"quant_method": "gptq"})
    with pytest.raises(UsageError, match="quantized with gptq"):
        resolve(str(folder))
    folder = llama(quantization_config=None)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"model\.safetensors is truncated"):
        resolve(str(folder))


def test_random_weights_need_no_remote_code(llama: Llama) -> None:
    folder = llama(auto_map={"AutoModelForCausalLM": "mine.Mine"})
    with pytest.raises(UsageError, match="--random-weights is for transformers' own classes"):
        resolve(str(folder), random_weights=True, trust_remote_code=True)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"text_config": {"torch_dtype": "float16"}}, "float16"),
        ({}, "float32"),
    ],
)
def test_dtype_is_what_the_configuration_states(tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    import json

    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **config}))
    assert resolve(str(path), random_weights=True).unquantized_dtype == dtype
    assert resolve(str(path), random_weights=True, dtype="half").unquantized_dtype == "float16"


def test_resolving_imports_neither_torch_nor_transformers(llama: Llama) -> None:
    code = (
        "import sys\nfrom kbitcheck.models.sources.resolve import resolve\nfrom kbitcheck.core.errors import UsageError\n"
        "for model in sys.argv[1:]:\n"
        "    source = resolve(model)\n"
        "    assert source.unquantized_dtype == 'bfloat16' and source.quant is None and not source.remote_code\n"
        "try:\n    resolve('org/name')\nexcept UsageError:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'bitsandbytes'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "tiny:llama", str(llama())], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
