"""Saved adapters in layouts of real repositories: shards, wrappers' names, modules that transformers 5 renamed or gathered."""

import json
import shutil
from dataclasses import replace
from itertools import product
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kbitcheck.core.errors import UsageError
from kbitcheck.core.result import Status
from kbitcheck.observe.adapter.folder import INDEX, WEIGHTS, read
from kbitcheck.run.saved_adapter import judge

OF_5 = pytest.mark.transformers5("what it renamed and gathered has its old name before it")
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8, "projection_dim": 32,
}  # fmt: skip


def lora(**fields):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})


def on(model, folder, config):
    """The base's folder and that of an adapter of it that moved."""
    torch.manual_seed(0)
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter")
    return str(folder / "base"), folder / "adapter"


def renamed(folder, rename):
    save_file({rename(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def result(report, code):
    return next(each for each in report if each.rule == code)


def llama(folder):
    return on(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), folder, lora())


def without_norms(saved):
    return replace(saved, layers={name: replace(layer, norm=None) for name, layer in saved.layers.items()})


def sharded(folder):
    tensors = load_file(folder / WEIGHTS)
    names = {key: f"adapter_model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({key: tensor for key, tensor in tensors.items() if names[key] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    (folder / WEIGHTS).unlink()
    return names


def test_shards_are_read_as_one_file(tmp_path):
    base, adapter = llama(tmp_path)
    whole = read(adapter)
    names = sharded(adapter)
    of_shards = read(adapter)
    assert without_norms(of_shards) == without_norms(whole)
    # In float32 the order in which 64 squares are added depends on where they lie in memory.
    close = pytest.approx([layer.norm for layer in whole.layers.values()], rel=64 * torch.finfo(torch.float32).eps)
    assert [layer.norm for layer in of_shards.layers.values()] == close
    report = judge(adapter, base=base)
    assert report.exit_code == 0
    assert "PEFT reads one file alone" in result(report, "KB804").reason
    (adapter / names[next(iter(names))]).unlink()
    with pytest.raises(UsageError, match="which its adapter_model"):
        read(adapter)
    (adapter / INDEX).write_text("{}")
    with pytest.raises(UsageError, match="has no weight_map"):
        read(adapter)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module"])
def test_a_wrapper_in_a_name_is_named_beside_the_modules_own(wrapper, tmp_path):
    base, adapter = llama(tmp_path)
    renamed(adapter, lambda key: key.replace(".layers.", f".{wrapper}.layers."))
    failures = result(judge(adapter, base=base, select_codes=["KB810"]), "KB810").failures
    assert len(failures) == 4
    assert failures[0].actual == "no such module; the base has model.layers.0.self_attn.q_proj"


def llava(folder):
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **SIZES}, vision_config=VISION, image_token_index=127, image_seq_length=4
    )
    return on(transformers.LlavaForConditionalGeneration(config), folder, lora())


@OF_5
def test_towers_under_the_names_of_transformers_4_are_where_peft_puts_them(tmp_path):
    base, adapter = llava(tmp_path)
    own = "base_model.model.model.language_model."
    renamed(adapter, lambda key: key.replace(own, "base_model.model.language_model.model."))
    report = judge(adapter, base=base)
    assert (report.exit_code, result(report, "KB810").status) == (0, Status.PASS), str(report)
    assert any("under other names" in note for note in result(report, "KB810").notes)
    assert "50% attention" in result(report, "KB801").notes[0]
    (facts,) = report.facts["cases"].values()
    assert facts["adapter"]["merge"]["layers"] == 6  # two of each of two blocks, and of the vision tower's one


@OF_5
def test_a_tower_that_peft_does_not_load_under_its_old_name_is_named(tmp_path):
    base, adapter = llava(tmp_path)
    renamed(adapter, lambda key: key.replace(".model.vision_tower.", ".vision_tower."))
    loaded = peft.PeftModel.from_pretrained(
        transformers.LlavaForConditionalGeneration.from_pretrained(base), str(adapter)
    )
    lost = {
        name for name, p in loaded.named_parameters() if "vision_tower" in name and "lora_B" in name and not p.any()
    }
    failures = result(judge(adapter, base=base, select_codes=["KB810"]), "KB810").failures
    assert len(lost) == len(failures) == 2


def mixtral(folder, **fields):
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    return on(transformers.MixtralForCausalLM(config), folder, lora(target_modules=["q_proj"], **fields))


@OF_5
def test_experts_of_any_width_are_merged(tmp_path):
    """Grouped products, which transformers takes where widths allow it, know no float64."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    base, adapter = mixtral(tmp_path, target_parameters=experts)
    report = judge(adapter, base=base)
    assert {each.rule for each in report if each.status is Status.ERROR} == set()
    assert result(report, "KB804").status is Status.PASS


@OF_5
def test_experts_that_were_modules_are_parts_of_the_stack_that_peft_makes_of_them(tmp_path):
    base, adapter = mixtral(tmp_path)
    tensors = load_file(adapter / WEIGHTS)
    for block, expert, (name, wide, high) in product(
        range(2), range(4), [("w1", 64, 48), ("w2", 48, 64), ("w3", 64, 48)]
    ):
        module = f"base_model.model.model.layers.{block}.block_sparse_moe.experts.{expert}.{name}"
        tensors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(4, wide)
        tensors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(high, 4)
    save_file(tensors, adapter / WEIGHTS)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "w1", "w2", "w3"]}))
    report = judge(adapter, base=base)
    assert (report.exit_code, result(report, "KB801").status) == (0, Status.PASS), str(report)
    assert "100% experts" in result(report, "KB801").notes[0]
    (facts,) = report.facts["cases"].values()
    assert facts["adapter"]["merge"]["effect"] > 0.01


def test_a_base_that_no_inputs_can_be_made_for_is_compared_and_not_merged(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise UsageError("its images come in a layout that kbitcheck does not support")

    base, adapter = llama(tmp_path)
    monkeypatch.setattr("kbitcheck.models.sources.source.Source.batch", refuse)
    report = judge(adapter, base=base)
    assert report.exit_code == 0
    assert "none can be made: its images" in result(report, "KB804").reason


BESIDE = ("trainer_state.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "README.md")


def output(folder, adapter, *checkpoints):
    """An output folder as trainers leave it: an adapter in each checkpoint, and files of theirs everywhere."""
    for place in (folder, *(folder / name for name in checkpoints)):
        place.mkdir(parents=True, exist_ok=True)
        for name in BESIDE:
            (place / name).write_text("{}")
        if place != folder:
            shutil.copytree(adapter, place, dirs_exist_ok=True)
    return folder


def test_an_adapter_is_read_among_a_trainers_files_and_checkpoints(tmp_path):
    base, adapter = llama(tmp_path)
    folder = output(tmp_path / "output", adapter, "checkpoint-5", "checkpoint-10")
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    assert judge(folder, base=base).exit_code == 0
    assert read(folder) == read(adapter)


def test_a_folder_of_several_checkpoints_names_the_last(tmp_path):
    _, adapter = llama(tmp_path)
    folder = output(tmp_path / "output", adapter, "checkpoint-5", "checkpoint-100", "checkpoint-20")
    with pytest.raises(UsageError) as raised:
        judge(folder)
    last = folder / "checkpoint-100"
    assert str(raised.value) == (
        f"{folder} has no adapter_config.json; 3 directories in it have one: name one, as {last}"
    )
    assert judge(last, select_codes=["KB806"]).exit_code == 0


@pytest.mark.parametrize("name", ["checkpoint-5", "run/checkpoint-5"])
def test_a_folder_of_one_checkpoint_names_it(name, tmp_path):
    _, adapter = llama(tmp_path)
    folder = output(tmp_path / "output", adapter, name)
    with pytest.raises(UsageError, match=f"there is one in {folder / name}$"):
        judge(folder)


def test_a_folder_of_a_merged_model_is_told(tmp_path):
    llama(tmp_path)
    with pytest.raises(UsageError, match=r"has no adapter_config.json; it holds a whole model$"):
        judge(tmp_path / "base")
