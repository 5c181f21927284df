"""Checkpoints that another quantizer made: their sizes to the byte, what they are, and whether they train."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.facts import Facts
from kbitcheck.core.result import Result, Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.models.sources.resolve import resolve, source_of
from kbitcheck.observe.static import StaticCase

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 640,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "dtype": "float16",
    "tie_word_embeddings": False,
}  # fmt: skip
# The configuration of openai/gpt-oss-20b.
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "tie_word_embeddings": False, "attention_bias": True,
    "dtype": "bfloat16",
}  # fmt: skip
MIXTRAL = {
    **LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "dtype": "bfloat16",
}  # fmt: skip
# (out, in) of the linear layers of a block of LLAMA.
ATTENTION = ((256, 256), (128, 256), (128, 256), (256, 256))
MLP = ((640, 256), (640, 256), (256, 640))
ALL = ATTENTION + MLP
PLAIN = 2 * 1000 * 256 * 2 + 5 * 256 * 2  # embedding and head, and the norms, in half precision


@pytest.fixture
def static(tmp_path: Path) -> Any:
    def opened(config: Mapping[str, Any], described: Mapping[str, Any], quant: str = "", **options: Any) -> StaticCase:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**config, "quantization_config": dict(described)}))
        quant = quant or resolve(str(path), static="always").quant or "nf4"
        spec = CaseSpec(
            model=str(path), quant=quant, implementation="peft", static="always", device="auto", seq_len=16, **options
        )
        return StaticCase(spec, source_of(spec, static="always"))

    return opened


def gptq(bits: int, group: int, shapes: Any) -> int:
    """As AutoGPTQ packs: int32 codes along the columns, zeros along the rows, float16 scales, a group for each column."""
    return sum(
        4 * (columns * bits // 32) * rows + (4 * (rows * bits // 32) + 2 * rows) * (columns // group) + 4 * columns
        for rows, columns in shapes
    )


def stored(case: StaticCase) -> int:
    """Bytes that a checkpoint has: all but the rotary frequencies, which are computed."""
    return case.base.nbytes - sum(t.nbytes for name, t in case.base.buffers.items() if "inv_freq" in name)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (8, 32), (3, -1)])
def test_gptq_is_right_to_the_byte(static: Any, bits: int, group: int) -> None:
    case = static(LLAMA, {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": True})
    blocks = sum(gptq(bits, columns if group == -1 else group, [(rows, columns)]) for rows, columns in ATTENTION + MLP)
    assert stored(case) == PLAIN + 2 * blocks
    assert {layer.scheme for layer in case.base.layers.values()} == {f"gptq-int{bits}"}
    assert case.why.startswith("no weights were read; transformers trains gptq")


def test_gptq_leaves_out_and_changes_what_dynamic_says(static: Any) -> None:
    dynamic = {"-:.*layers\\.0\\.mlp": {}, "+:.*self_attn": {"bits": 8}}
    case = static(LLAMA, {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": dynamic})
    mlp = 2 * sum(rows * columns for rows, columns in MLP) + gptq(4, 128, MLP)
    assert stored(case) == PLAIN + mlp + 2 * gptq(8, 128, ATTENTION)


def test_gptq_packs_the_head_where_a_checkpoint_says_so(static: Any) -> None:
    described = {"quant_method": "gptq", "bits": 4, "group_size": 32, "lm_head": True}
    head = gptq(4, 32, [(1000, 256)]) - 2 * 1000 * 256
    assert stored(static(LLAMA, described)) == PLAIN + head + 2 * gptq(4, 32, ALL)


def test_awq_is_right_to_the_byte(static: Any) -> None:
    described = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    case = static(LLAMA, described)
    packed = sum(columns * rows // 2 + (columns // 128) * (rows // 2 + 2 * rows) for rows, columns in ATTENTION + MLP)
    assert stored(case) == PLAIN + 2 * packed
    part = static(LLAMA, {**described, "modules_to_not_convert": ["mlp"]}).base
    assert all(".self_attn." in name for name in part.layers)


@pytest.mark.parametrize(("method", "cast"), [("gptq", 0), ("awq", PLAIN)])
def test_what_peft_leaves_as_it_is_takes_no_more(static: Any, method: str, cast: int) -> None:
    """PEFT's function casts nothing of a GPTQ model, and all that is half of one whose method it does not know."""
    described = {"quant_method": method, "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    case = static(LLAMA, {n: v for n, v in described.items() if method == "awq" or n not in ("version", "zero_point")})
    assert case.weights.upcast == cast


@pytest.mark.parametrize(("books", "bits", "rows", "columns"), [(1, 16, 1, 8), (2, 8, 1, 8), (4, 12, 2, 16)])
def test_aqlm_is_right_to_the_byte(static: Any, books: int, bits: int, rows: int, columns: int) -> None:
    described = {
        "quant_method": "aqlm", "num_codebooks": books, "nbits_per_codebook": bits, "out_group_size": rows,
        "in_group_size": columns, "linear_weights_not_to_quantize": ["lm_head.weight", "model.norm.weight"],
    }  # fmt: skip
    case = static(LLAMA, described)
    code, codebooks = (1 if bits <= 8 else 2), 2 * books * 2**bits * rows * columns
    packed = sum(code * books * (r // rows) * (c // columns) + codebooks + 2 * (r // rows) for r, c in ATTENTION + MLP)
    assert stored(case) == PLAIN + 2 * packed
    assert {layer.scheme for layer in case.base.layers.values()} == {"aqlm"}


def blocks(size: int) -> int:
    return -(-size // 128)


def test_fp8_is_right_to_the_byte(static: Any) -> None:
    case = static(LLAMA, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"})
    packed = sum(rows * columns + 4 * blocks(rows) * blocks(columns) for rows, columns in ATTENTION + MLP)
    assert stored(case) == PLAIN + 2 * packed
    whole = static(LLAMA, {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"})
    assert stored(whole) == PLAIN + 2 * sum(rows * columns + 8 for rows, columns in ATTENTION + MLP)


def test_an_fp8_checkpoint_of_autofp8_has_a_scale_for_each_weight(static: Any) -> None:
    """As neuralmagic/Meta-Llama-3-8B-Instruct-FP8, whose configuration has no sizes of blocks."""
    described = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    assert stored(static(LLAMA, described)) == PLAIN + 2 * sum(rows * columns + 4 + 4 for rows, columns in ALL)
    described = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
    assert stored(static(LLAMA, described)) == PLAIN + 2 * sum(rows * columns + 4 for rows, columns in ALL)


@pytest.mark.transformers5("before it, experts are linear layers")
def test_what_a_router_keeps_in_float32_is_counted_so(static: Any) -> None:
    """As deepseek-ai/DeepSeek-V3, whose correction of scores is a buffer."""
    heads, latent, rope, inner = 4, 64, 32, 128
    deepseek = {
        **LLAMA, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16",
        "moe_intermediate_size": 128, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "kv_lora_rank": latent, "q_lora_rank": latent, "qk_nope_head_dim": inner,
        "qk_rope_head_dim": rope, "v_head_dim": inner, "num_key_value_heads": heads, "n_group": 2, "topk_group": 1,
    }  # fmt: skip

    def packed(*shapes: tuple[int, int]) -> int:
        return sum(rows * columns + 4 * blocks(rows) * blocks(columns) for rows, columns in shapes)

    queries = packed((latent, 256), (heads * (inner + rope), latent))
    values = packed((latent + rope, 256), (heads * 2 * inner, latent), (256, heads * inner))
    expert = packed((128, 256), (128, 256), (256, 128))
    routed = 9 * expert + 2 * 8 * 256 + 4 * 8  # one is shared; router, correction
    case = static(deepseek, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"})
    assert stored(case) == PLAIN + 2 * (queries + values + 2 * 2 * latent) + packed(*MLP) + routed


@pytest.mark.transformers5("before it, experts are linear layers")
def test_stacked_experts_are_packed_each_by_itself(static: Any) -> None:
    case = static(MIXTRAL, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    linear = sum(rows * columns + 4 * blocks(rows) * blocks(columns) for rows, columns in ATTENTION)
    experts = 4 * sum(rows * columns + 4 * blocks(rows) * blocks(columns) for rows, columns in MLP)
    assert stored(case) == PLAIN + 2 * (linear + experts + 2 * 4 * 256)  # with a router
    assert [layer.out_features for layer in case.base.layers.values() if layer.stack] == [4 * 1280, 4 * 256] * 2
    result = judged(case, "KB901")
    assert result.status is Status.PASS  # experts are quantized


def compressed(weights: Mapping[str, Any], layout: str, **group: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, **group}}
    return {"quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"], "config_groups": groups}


W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {**INT8, "type": "float"}
COMPRESSED = {
    "W4A16": (
        compressed(W4, "pack-quantized"), sum(r * c // 2 + 2 * r * (c // 128) + 16 for r, c in ALL)
    ),
    "W4A16, asymmetric": (
        compressed({**W4, "symmetric": False}, "pack-quantized"),
        sum(r * c // 2 + (2 * r + r // 2) * (c // 128) + 16 for r, c in ALL),
    ),
    "W8A8": (compressed(INT8, "int-quantized", input_activations={"dynamic": True}), sum(r * c + 2 * r for r, c in ALL)),
    "FP8, dynamic": (
        compressed(FP8, "float-quantized", input_activations={"dynamic": True}), sum(r * c + 2 * r for r, c in ALL)
    ),
    "FP8, static": (
        compressed({**FP8, "strategy": "tensor"}, "float-quantized", input_activations={"dynamic": False}),
        sum(r * c + 4 for r, c in ALL),
    ),
    "FP8, blocks": (
        compressed({**FP8, "strategy": "block", "block_structure": [128, 128]}, "float-quantized", format="float-quantized"),
        sum(r * c + 2 * (-(-r // 128)) * (-(-c // 128)) for r, c in ALL),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors_is_right_to_the_byte(static: Any, kind: str) -> None:
    described, packed = COMPRESSED[kind]
    assert stored(static(LLAMA, described)) == PLAIN + 2 * packed


def test_scales_of_a_cache_are_counted(static: Any) -> None:
    described, packed = COMPRESSED["FP8, static"]
    cached = {**described, "kv_cache_scheme": {**FP8, "strategy": "tensor", "dynamic": False}}
    assert stored(static(LLAMA, cached)) == PLAIN + 2 * (packed + 2 + 2)
    for other in ({"strategy": "attn_head"}, {"strategy": "tensor", "dynamic": True}):
        case = static(LLAMA, {**described, "kv_cache_scheme": {**FP8, **other}})
        assert "quantization is not verified" in case.why


def test_the_groups_of_compressed_tensors_are_told_apart(static: Any) -> None:
    described = compressed(W4, "pack-quantized")
    described["config_groups"]["group_1"] = {"targets": ["re:.*self_attn.*"], "weights": INT8}
    described["ignore"] = ["lm_head", "re:.*down_proj", "model.layers.1.mlp.up_proj"]
    layers = static(LLAMA, described).base.layers
    assert {layer.scheme for name, layer in layers.items() if "self_attn" in name} == {"compressed-tensors-int8"}
    assert {name for name in layers if "mlp" in name} == {
        "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj"
    }  # fmt: skip


def test_what_a_forward_unpacks_is_forecast_unpacked(static: Any) -> None:
    case = static(LLAMA, compressed(W4, "pack-quantized"))
    numbers = 2 * sum(rows * columns for rows, columns in ALL)
    assert sum(group.packed for group in case.forecast.groups.values()) == 2 * numbers
    assert "which the first forward turns into plain numbers" in case.why
    assert judged(case, "KB912").failures[0].actual.startswith("unpacked by the first forward: ")


@pytest.mark.transformers5("gpt-oss stores experts otherwise before it")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is unpacked where kernels are installed")
def test_gpt_oss_is_no_4_bit_training(static: Any) -> None:
    case = static(GPT_OSS, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    hidden, experts = 2880, 32
    attention = (2 * 4096 + 1024) * hidden + 4096 + 1024 + hidden + 64  # q and o, k and v, biases, sinks
    router, norms, biases = experts * (hidden + 1), 2 * hidden, experts * 3 * hidden
    packed = experts * 3 * hidden * (hidden // 2 + hidden // 32)
    plain = 2 * (2 * 201088 * hidden + hidden + 24 * (attention + router + norms + biases))
    expected = plain + 24 * packed + 2 * 32 * 4
    unpacked = plain + 24 * 2 * experts * 3 * hidden * hidden + 2 * 32 * 4
    assert case.base.nbytes == expected
    assert "the checkpoint is mxfp4, which loading turns into plain numbers on this machine" in case.why
    assert "transformers does not train mxfp4" in case.why
    failure = judged(case, "KB912").failures[0]
    assert (failure.expected, failure.actual) == (
        f"mxfp4, {expected:,} bytes", f"unpacked by loading: {unpacked:,} bytes"
    )  # fmt: skip
    assert [f.where for f in judged(case, "KB913").failures] == ["mxfp4", "the preparation"]
    assert case.forecast.missing == "no layer is quantized, so that there are no adapters to train"


def judged(case: Facts, code: str) -> Result:
    return judge(rules()[code], case)


def test_a_step_unpacks_each_weight_and_holds_none(static: Any) -> None:
    case = static(LLAMA, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert case.forecast.missing == ""
    weights = 2 * 2 * sum(rows * columns for rows, columns in ATTENTION + MLP)
    assert 0 < case.forecast.activations["off"].held < weights < case.forecast.parameters * 2


def test_an_explicit_quantization_is_forecast_of_the_original(static: Any) -> None:
    case = static(LLAMA, {"quant_method": "awq", "bits": 4}, quant="nf4")
    assert {layer.scheme for layer in case.base.layers.values()} == {"nf4"}


def test_a_layout_that_nobody_published_is_named(static: Any) -> None:
    case = static(LLAMA, {"quant_method": "awq", "bits": 4, "version": "gemv"})
    assert "its own awq quantization is not verified, sizes are those of nf4" in case.why


def test_nothing_is_quantized_on_load_by_a_layout_alone() -> None:
    with pytest.raises(UsageError, match="cannot be quantized on load"):
        resolve("tiny:llama").load(Quantization.parse("mxfp4"))


@pytest.mark.transformers5("before it, a name matches in the middle of a path")
@pytest.mark.parametrize("skip", ["vision_tower", "multi_modal_projector"])
def test_a_skip_list_that_is_not_honoured_is_told_of(skip: str) -> None:
    spec = CaseSpec(model="tiny:llava", quant=f"nf4,skip={skip}", implementation="peft", static="always", device="auto")
    result = judged(StaticCase(spec, source_of(spec, static="always")), "KB909")
    assert result.status is Status.FAIL
    assert all(skip in failure.where for failure in result.failures)
    path = CaseSpec(model="tiny:llava", quant=f"nf4,skip=model.{skip}", implementation="peft", static="always")
    assert judged(StaticCase(path, source_of(path, static="always")), "KB909").status is Status.PASS


LISTED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "modules_to_not_convert"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "modules_to_not_convert"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "llm_int8_skip_modules"),
]


@pytest.mark.transformers5("before it, a name matches in the middle of a path")
@pytest.mark.parametrize(
    ("described", "key"), LISTED, ids=lambda each: each["quant_method"] if isinstance(each, dict) else ""
)
@pytest.mark.parametrize(
    ("listed", "failing"),
    [
        (["model.layers.0.mlp"], []),
        ([r"model\.layers\.\d+\.mlp", "lm_head"], []),
        (["q_proj"], []),
        (["mlp"], ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),  # in the middle of a path
        (["p_proj"], ["mlp.up_proj"]),  # at the end of names that it is not
    ],
)  # fmt: skip
def test_a_checkpoints_own_list_is_judged_as_transformers_reads_it(
    static: Any, described: Mapping[str, Any], key: str, listed: list[str], failing: list[str]
) -> None:
    result = judged(static(LLAMA, {**described, key: listed}), "KB909")
    assert result.status is (Status.FAIL if failing else Status.PASS)
    places = {failure.where for failure in result.failures}
    assert all(f"model.layers.1.{name}" in places for name in failing)
    assert len(places) == 2 * len(failing)  # of two blocks


@pytest.mark.transformers5("before it, a name matches in the middle of a path")
def test_a_list_in_the_checkpoints_names_is_judged_by_the_models(static: Any) -> None:
    """transformers renames FP8's entries as it renames weights, and other methods' not."""
    llava = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "dtype": "bfloat16",
        "text_config": {**LLAMA, "hidden_size": 64, "intermediate_size": 64},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
    }  # fmt: skip
    awq, fp8 = LISTED[0][0], LISTED[1][0]
    listed = {"modules_to_not_convert": ["language_model.model.layers.1.mlp", "lm_head"]}
    result = judged(static(llava, {**awq, **listed}), "KB909")
    assert {failure.where for failure in result.failures} == {
        f"model.language_model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    assert judged(static(llava, {**fp8, **listed}), "KB909").status is Status.PASS
