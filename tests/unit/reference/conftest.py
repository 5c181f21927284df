"""Tiny quantized models, made in memory, saved once a session and loaded afresh for each test."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[3] / "reference"))

import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_SEQ2SEQ = {"d_model": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "vocab_size": 96, **_LAYERS},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**_SEQ2SEQ, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 96, "dropout_rate": 0.0},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": 64, "ffn_dim": 128, "vocab_size": 96, "word_embed_proj_dim": 64, "dropout": 0.0,
            "max_position_embeddings": 32, **_LAYERS,
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 32,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **_SEQ2SEQ, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 96,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 8,
            "max_source_positions": 16, "max_target_positions": 16, "dropout": 0.0,
        },
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        {
            "hidden_size": 64, "intermediate_size": 128, "vocab_size": 16, "conv_dim": (32,), "conv_stride": (5,),
            "conv_kernel": (10,), "num_feat_extract_layers": 1, "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0,
            "feat_proj_dropout": 0.0, "activation_dropout": 0.0, "final_dropout": 0.0, "mask_time_prob": 0.0, **_LAYERS,
        },
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {"hidden_size": 64, "intermediate_size": 128, "image_size": 16, "patch_size": 8, **_LAYERS},
    ),
    "ctrl": ("CTRLConfig", "CTRLLMHeadModel", {"n_embd": 64, "dff": 64, "n_layer": 1, "n_head": 4, "vocab_size": 96}),
}  # fmt: skip

_QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="session")
def _checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def checkpoint(arch: str) -> Path:
        if arch not in made:
            config_name, model_name, arguments = _CONFIGS[arch]
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = getattr(transformers, model_name)(getattr(transformers, config_name)(**arguments))
                for parameter in model.parameters():  # fresh norms are all ones, and fresh biases zeros
                    if parameter.ndim == 1:
                        parameter.data.add_(torch.randn(parameter.shape) * 0.1)
            made[arch] = tmp_path_factory.mktemp(arch)
            model.to(torch.bfloat16).save_pretrained(made[arch])
        return made[arch]

    return checkpoint


@pytest.fixture
def load(_checkpoints: Callable[[str], Path]) -> Callable[..., Any]:
    """Return ``load(arch, quantization="nf4", dtype=torch.bfloat16, **options_of_bitsandbytes)``."""

    def load_model(
        arch: str, quantization: str | None = "nf4", dtype: torch.dtype = torch.bfloat16, **options: Any
    ) -> Any:
        if quantization is not None:
            options = _QUANTIZATIONS[quantization] | options
            if "load_in_4bit" in options:
                options = {"bnb_4bit_compute_dtype": torch.float32} | options
            options = {"quantization_config": BitsAndBytesConfig(**options)}  # its
        cls = getattr(transformers, _CONFIGS[arch][1])
        return cls.from_pretrained(_checkpoints(arch), device_map="cpu", dtype=dtype, **options)

    return load_model


@pytest.fixture
def batch() -> Callable[[str], dict[str, torch.Tensor]]:
    """Return ``batch(arch)``: the inputs of a training step, always the same."""

    def make(arch: str) -> dict[str, torch.Tensor]:
        ids = torch.arange(16).reshape(2, 8) + 3
        generator = torch.Generator().manual_seed(0)
        if arch == "whisper":
            return {"input_features": torch.randn(2, 8, 32, generator=generator), "labels": ids}
        if arch == "wav2vec2":
            return {"input_values": torch.randn(2, 200, generator=generator), "labels": ids % 16}
        if arch == "vit":
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 1])}
        return {"input_ids": ids, "labels": ids}

    return make


@pytest.fixture
def tensor_bytes() -> Callable[[torch.Tensor], bytes]:
    """Return a function that gives a tensor's raw bytes, whatever its dtype."""

    def raw(tensor: torch.Tensor) -> bytes:
        return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())

    return raw


@pytest.fixture
def snapshot(tensor_bytes: Callable[[torch.Tensor], bytes]) -> Callable[[nn.Module], dict[str, Any]]:
    """Return a function that records all that a preparation may or may not change, in comparable form."""

    def state_of(parameter: torch.Tensor) -> list[bytes]:
        state = getattr(parameter, "quant_state", None)
        found = [getattr(parameter, "SCB", None)]
        if state is not None:
            found += [state.absmax, state.code, state.offset]
            found += [state.state2.absmax, state.state2.code] if state.nested else []
        return [tensor_bytes(tensor) for tensor in found if tensor is not None]

    def take(model: nn.Module) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for name, parameter in model.named_parameters():
            raw = tensor_bytes(parameter)
            facts[name] = (type(parameter), parameter.dtype, raw, state_of(parameter), parameter.requires_grad)
        for name, buffer in model.named_buffers():
            facts[name] = (buffer.dtype, tensor_bytes(buffer))
        for name, module in model.named_modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            checkpointing = getattr(module, "gradient_checkpointing", None)
            function = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", None)
            facts[f"{name}()"] = (type(module), module.training, hooks, checkpointing, function)
        return facts

    return take


@pytest.fixture
def gradients(batch: Callable[[str], dict[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
    """Return ``gradients(model, arch)``: those of every trainable parameter after one training step."""

    def run(model: Any, arch: str) -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(**batch(arch)).loss.backward()
        missing = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return grads | {name: torch.zeros(()) for name in missing}

    return run
