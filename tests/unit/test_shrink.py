"""The shrinker makes valid, tiny configurations, and keeps what makes an architecture itself."""

from __future__ import annotations

import json
import os
from collections.abc import Container
from importlib.metadata import version
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import PretrainedConfig

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.architecture import Architecture, listed
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.models.zoo.shrink import VOCABULARY, families, tiny

SMALL = 1_000_000


class Plain(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    model_type = "plain_of_this_test"

    def __init__(
        self,
        vocab_size: int = 50_000,
        d_model: int = 4096,
        num_heads: int = 32,
        num_kv_heads: int = 8,
        head_dim: int = 128,
        d_ff: int = 11_008,
        num_layers: int = 32,
        num_experts: int = 64,
        top_k: int = 8,
        q_lora_rank: int | None = None,
        d_state: int = 128,
        conv_kernel: int = 4,
        layer_types: list[str] | None = None,
        no_rope: tuple[int, ...] = (1, 1, 1, 0) * 8,
        attn_idxs: tuple[int, ...] = (1, 3, 30),
        cross_layers: tuple[int, ...] = (7, 15, 23, 31),
        stages: tuple[int, ...] = (96, 192, 384),
        pinpoints: tuple[tuple[int, int], ...] = ((1, 2), (2, 1)),
        num_image_tokens: int = 576,
        stop_token_ids: tuple[int, ...] = (7, 49_999),
        image_token_id: int = 49_998,
        tie_word_embeddings: bool = False,
        eos_token_id: int = 49_999,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in list(locals().items()):
            if name not in ("self", "kwargs", "__class__"):
                setattr(self, name, value)
        self.layer_types = layer_types or (["sliding"] * 3 + ["full"]) * (num_layers // 4)
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, "eos_token_id": eos_token_id, **kwargs})


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return tiny(Plain)


def test_sizes_fit_each_other(plain: dict[str, Any]) -> None:
    assert plain["d_model"] == plain["num_heads"] * plain["head_dim"]
    assert plain["num_heads"] % plain["num_kv_heads"] == 0
    assert 1 < plain["num_kv_heads"] < plain["num_heads"]
    assert 1 < plain["top_k"] < plain["num_experts"]
    assert plain["d_state"] <= 16
    assert plain["d_ff"] <= 2 * plain["d_model"]


def test_what_is_off_or_small_stays(plain: dict[str, Any]) -> None:
    assert not {"q_lora_rank", "conv_kernel", "tie_word_embeddings"} & plain.keys()


def test_each_kind_of_layer_comes_twice(plain: dict[str, Any]) -> None:
    assert plain["layer_types"] == ["sliding", "full", "sliding", "full"]
    assert plain["no_rope"] == [1, 0, 1, 0]
    assert plain["num_layers"] == 4
    assert plain["attn_idxs"] == [1, 3]


def test_of_layers_that_are_all_cut_off_the_last_is_kept(plain: dict[str, Any]) -> None:
    assert plain["cross_layers"] == [3]


def test_a_list_of_other_numbers_is_left_alone(plain: dict[str, Any]) -> None:
    assert plain["stages"] == [96, 192, 384]
    assert plain["pinpoints"] == [[1, 2], [2, 1]]
    assert "num_image_tokens" not in plain


def test_special_tokens_move_into_the_vocabulary_together(plain: dict[str, Any]) -> None:
    assert plain["vocab_size"] == VOCABULARY
    assert plain["stop_token_ids"] == [7, plain["eos_token_id"]]
    assert plain["image_token_id"] != plain["eos_token_id"]
    assert max(plain["image_token_id"], plain["eos_token_id"]) < VOCABULARY
    assert plain["pad_token_id"] == 0


def test_fields_are_json(plain: dict[str, Any]) -> None:
    assert json.loads(json.dumps(plain)) == plain


def needs(kind: str, known: Container[str]) -> None:
    """Only transformers 4 may lack an architecture; elsewhere its name is wrong here."""
    if kind not in known:
        assert version("transformers").startswith("4."), f"no {kind}"
        pytest.skip(f"transformers 4 has no {kind}")


def test_a_kind_per_layer_in_runs_meets_a_kind_in_turns() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    needs("kimi_linear", CONFIG_MAPPING)
    config = CONFIG_MAPPING["kimi_linear"](
        **{k: v for k, v in tiny(CONFIG_MAPPING["kimi_linear"]).items() if k != "model_type"}
    )
    assert len({*zip(config.layer_types, config.mlp_layer_types, strict=True)}) == 4


# One of each kind: dense, tied, grouped, experts, latent attention, state space, hybrid, encoder-decoder, images, audio.
KINDS = (
    ("causal-lm", "llama"),
    ("causal-lm", "gpt2"),
    ("causal-lm", "bert"),
    ("causal-lm", "deepseek_v3"),
    ("causal-lm", "mamba"),
    ("causal-lm", "mamba2"),
    pytest.param("causal-lm", "jamba", marks=pytest.mark.transformers5("asks for CUDA kernels")),
    ("causal-lm", "qwen3_next"),
    ("causal-lm", "gpt_oss"),
    ("causal-lm", "llama4"),
    ("seq2seq-lm", "t5"),
    ("seq2seq-lm", "bart"),
    ("image-text-to-text", "llava"),
    ("speech-seq2seq", "whisper"),
    ("sequence-classification", "roberta"),
    ("masked-lm", "deberta-v2"),
    # What made others invalid: widths that double at each stage, sizes that add up, chunks, a part's own defaults.
    ("speech-seq2seq", "vibevoice"),
    ("speech-seq2seq", "vibevoice_asr"),
    ("speech-seq2seq", "fun_asr_nano"),
    ("speech-seq2seq", "moonshine_streaming"),
    ("speech-seq2seq", "dia"),
    ("seq2seq-lm", "nemo_speechlm"),
    ("sequence-classification", "layoutlmv3"),
    ("sequence-classification", "lilt"),
    ("masked-lm", "perceiver"),
    ("masked-lm", "mobilebert"),
)


@pytest.mark.parametrize(("task", "kind"), KINDS, ids=lambda v: v)
def test_a_shrunk_architecture_runs_and_learns(task: str, kind: str) -> None:
    import torch

    from kbitcheck.models import load as loading

    needs(kind, listed(task))
    source = resolve(f"arch:{task}/{kind}")
    assert isinstance(source, Architecture)
    fields = source.fields()
    assert json.loads(json.dumps(fields)) == fields
    config = loading.configuration(fields, name=kind)
    model = loading.architecture(config)(config)
    assert sum(p.numel() for p in model.parameters()) < SMALL
    output = model.train()(**source.batch(model))
    output.loss.backward()
    assert torch.isfinite(output.loss)


@pytest.mark.transformers5("transformers 4 makes no such configuration without its parts")
def test_a_part_keeps_what_is_not_its_classs_default() -> None:
    source = resolve("arch:seq2seq-lm/encoder-decoder")
    assert isinstance(source, Architecture)
    decoder = source.fields()["decoder"]
    assert decoder["is_decoder"] is True  # BERT's default is False: without it there is no cross-attention
    assert decoder["add_cross_attention"] is True


def test_a_class_for_text_alone_takes_the_text_configuration() -> None:
    needs("llama4", listed("causal-lm"))
    source = resolve("arch:llama4")
    assert isinstance(source, Architecture)
    assert source.fields()["model_type"] == "llama4_text"


def test_a_parts_default_is_told_where_its_class_has_another() -> None:
    needs("paligemma", listed("image-text-to-text"))
    source = resolve("arch:image-text-to-text/paligemma")
    assert isinstance(source, Architecture)
    assert source.fields()["text_config"]["num_key_value_heads"] == 1


@pytest.mark.transformers5("the part is new")
def test_a_part_that_is_left_open_comes_as_families_tell() -> None:
    source = resolve("arch:image-text-to-text/gemma4")
    assert isinstance(source, Architecture)
    vision = source.fields()["vision_config"]
    assert vision["model_type"] == "gemma4_vision"
    assert vision["num_hidden_layers"] == 2


@pytest.mark.transformers5("the family is new")
def test_what_no_packed_weight_can_stand_is_left_unquantized() -> None:
    model = resolve("arch:image-text-to-text/lfm2_vl").load(Quantization())
    kept = [type(m).__name__ for name, m in model.named_modules() if name.endswith("patch_embedding")]
    assert kept == ["Linear"]


@pytest.mark.transformers5("configurations always have the field")
def test_decoders_decode() -> None:
    source = resolve("arch:bert")
    assert isinstance(source, Architecture)
    assert source.fields()["is_decoder"] is True
    masked = resolve("arch:masked-lm/bert")
    assert isinstance(masked, Architecture)
    assert "is_decoder" not in masked.fields()


@pytest.mark.parametrize("name", ["arch:", "arch:no-such-task/llama", "arch:causal-lm/"])
def test_what_names_no_architecture_is_wrong_usage(name: str) -> None:
    with pytest.raises(UsageError, match="names no architecture; write arch:TYPE or arch:TASK/TYPE"):
        resolve(name)


def test_an_unknown_type_is_wrong_usage_with_a_hint() -> None:
    source = resolve("arch:lama")
    with pytest.raises(UsageError, match=r"no causal-lm model of type 'lama' \(did you mean llama\?\)"):
        _ = source.checkpoint


def test_families_are_of_this_transformers_and_still_needed() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    needs("dots3_note_text", CONFIG_MAPPING)
    assert set(families()) <= {*CONFIG_MAPPING.keys()}
