"""Saved adapters: what is read of every method's files, and what is said of them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from kbitcheck.cli import main
from kbitcheck.core.errors import UsageError
from kbitcheck.core.result import Status
from kbitcheck.core.rule import judge as core_judge
from kbitcheck.core.rule import rules
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.adapter.case import AdapterCase
from kbitcheck.observe.adapter.folder import CONFIG, PICKLE, WEIGHTS, read
from kbitcheck.run.saved_adapter import judge

OF_FILES = ["KB801", "KB806", "KB807", "KB808", "KB809", "KB810"]
TARGETS = ["q_proj", "v_proj"]
Q, V = (f"model.layers.0.self_attn.{name}" for name in TARGETS)
STARTS_AT_ZERO = {
    "lora": peft.LoraConfig(r=4, target_modules=TARGETS),
    "dora": peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "gaussian": peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian"),
    "embedding": peft.LoraConfig(r=4, target_modules=[*TARGETS, "embed_tokens"]),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS),
    "loha": peft.LoHaConfig(r=4, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=4, target_modules=TARGETS),
    "oft": peft.OFTConfig(oft_block_size=12, target_modules=TARGETS),
    "boft": peft.BOFTConfig(boft_block_size=6, target_modules=TARGETS),
}
CANNOT_BE_TOLD = {
    "pissa": peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
    "olora": peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"),
    "random": peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


def base(name: str = "tiny:llama") -> Any:
    source = resolve(name)
    model = source.meta(None).to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves an adapter by its configuration, once a module."""
    folder = tmp_path_factory.mktemp("adapters")

    def save(name, config, model="tiny:llama"):
        if not (folder / name).exists():
            peft.get_peft_model(base(model), config).save_pretrained(folder / name)
        return folder / name

    return save


def statuses(report):
    return {result.rule: result.status for result in report}


@pytest.mark.parametrize("name", STARTS_AT_ZERO)
def test_an_adapter_that_never_moved_is_told_by_what_starts_at_zero(name, saved, tmp_path):
    folder = saved(name, STARTS_AT_ZERO[name])
    assert statuses(judge(folder, base="tiny:llama", select_codes=OF_FILES))["KB806"] is Status.FAIL
    moved = shutil.copytree(folder, tmp_path / "moved")
    tensors = load_file(moved / WEIGHTS)
    save_file({key: tensor + 0.5 for key, tensor in tensors.items()}, moved / WEIGHTS)
    report = judge(moved, base="tiny:llama", select_codes=OF_FILES)
    assert set(statuses(report).values()) == {Status.PASS}, str(report)
    assert report.exit_code == 0


@pytest.mark.parametrize("name", CANNOT_BE_TOLD)
def test_where_the_start_is_not_stored_nothing_is_said_of_moving(name, saved):
    report = judge(saved(name, CANNOT_BE_TOLD[name]), base="tiny:llama", select_codes=OF_FILES)
    assert statuses(report)["KB806"] is statuses(report)["KB807"] is Status.SKIP
    assert report.exit_code == 0
    assert "cannot be told" in str(report)
    assert "nothing wrong in what could be looked at" in str(report)


def test_rank_scaling_and_norm_are_those_of_the_layer(tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, rank_pattern={"layers.0.self_attn.q_proj": 2}, use_rslora=True
    )
    model = peft.get_peft_model(base(), config)
    layers = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    adapter = read(tmp_path)
    assert [adapter.layers[module].rank for module in (Q, V)] == [2, 4]
    for module, layer in adapter.layers.items():
        own = layers[f"base_model.model.{module}"]
        assert layer.scaling == pytest.approx(own.scaling["default"])
        assert layer.norm == pytest.approx(float(own.get_delta_weight("default").detach().norm()), rel=1e-4)


@pytest.mark.transformers5("before it, experts are modules of their own")
def test_a_stack_of_experts_is_read_expert_by_expert(tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    model: Any = peft.get_peft_model(base("tiny:mixtral"), config)
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    count = wrapper.num_experts
    for module in model.modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            torch.nn.init.normal_(module.lora_B["default"].weight)
    with torch.no_grad():
        wrapper.lora_B["default"].weight.unflatten(1, (-1, count))[..., 1] = 0  # the second expert's
        assert not wrapper.get_delta_weight("default")[1].any()
    model.save_pretrained(tmp_path)
    layer = read(tmp_path).layers["model.layers.0.mlp.experts"]
    assert (layer.experts, layer.rank, layer.still) == (count, 2, (1,))
    assert layer.norm == pytest.approx(float(wrapper.get_delta_weight("default").detach().norm()), rel=1e-4)
    failed = {
        result.rule: result.failures
        for result in judge(tmp_path, base="tiny:mixtral", select_codes=OF_FILES)
        if result.failures
    }
    assert set(failed) == {"KB807"}
    assert failed["KB807"][0].actual == "zero in experts 1"


def test_what_is_saved_whole_is_beside_the_layers(saved):
    config = peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    adapter = read(saved("beside", config))
    head, tokens = adapter.layers["lm_head"], adapter.layers["model.embed_tokens"]
    assert head.whole
    assert (tokens.whole, list(tokens.tensors)) == (False, ["trainable_tokens_delta"])


def test_files_of_a_state_with_the_adapters_name_in_it_are_read_alike(saved, tmp_path):
    folder = saved("lora", STARTS_AT_ZERO["lora"])
    named = shutil.copytree(folder, tmp_path / "named")
    tensors = load_file(named / WEIGHTS)
    save_file({re.sub(r"(lora_[AB])", r"\1.default", key): tensor for key, tensor in tensors.items()}, named / WEIGHTS)
    assert {m: layer.rank for m, layer in read(named).layers.items()} == {
        m: layer.rank for m, layer in read(folder).layers.items()
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_torch_wrote_are_read_alike(zipped, saved, tmp_path):
    """As PEFT did before safetensors, and torch before its zip files."""
    folder = saved("lora", STARTS_AT_ZERO["lora"])
    old = shutil.copytree(folder, tmp_path / "old")
    (old / WEIGHTS).unlink()
    torch.save(load_file(folder / WEIGHTS), old / PICKLE, _use_new_zipfile_serialization=zipped)
    assert read(old).layers == read(folder).layers


def test_the_reach_is_the_share_of_the_bases_weights(saved):
    report = judge(saved("lora", STARTS_AT_ZERO["lora"]), base="tiny:llama", select_codes=["KB801"])
    model = resolve("tiny:llama").meta(None)
    every = sum(parameter.numel() for parameter in model.parameters())
    reached = sum(p.numel() for name, p in model.named_parameters() if any(target in name for target in TARGETS))
    (note,) = next(result.notes for result in report if result.rule == "KB801")
    assert f"{reached / every:.0%} of the weights" in note
    assert "0% mlp" in note


def test_a_base_that_is_on_this_machine_is_compared_unasked(saved, tmp_path):
    folder = shutil.copytree(saved("lora", STARTS_AT_ZERO["lora"]), tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    for name, status in (("tiny:llama", Status.PASS), ("tiny:mixtral", Status.FAIL), ("somebody/absent", Status.SKIP)):
        (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": name}))
        assert statuses(judge(folder))["KB810"] is status, name


def pickled(item, folder):
    (folder / WEIGHTS).unlink()
    torch.save(item, folder / PICKLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / CONFIG).write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / CONFIG).write_text("{}"), "states no peft_type"),
        (lambda folder: (folder / CONFIG).write_text('{"peft_type": "LORA", "r": "four"}'), "a wrong r: 'four'"),
        (
            lambda folder: (folder / CONFIG).write_text('{"peft_type": "LORA", "rank_pattern": {"(": 4}}'),
            "a wrong rank_pattern",
        ),
        (
            lambda folder: (folder / CONFIG).write_text('{"peft_type": "LORA", "target_modules": "("}'),
            "a wrong target_modules",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / WEIGHTS).rename(folder / PICKLE), "no pickle of tensors alone"),
        (lambda folder: pickled([1], folder), "other things than tensors"),
        (lambda folder: pickled(Path("x"), folder), "no pickle of tensors"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100]), "truncated"),
    ],
)
def test_what_is_no_adapter_is_refused_in_one_line(change, message, saved, tmp_path, capsys):
    folder = shutil.copytree(saved("lora", STARTS_AT_ZERO["lora"]), tmp_path / "adapter")
    change(folder)
    assert main.run(["adapter", str(folder)]) == 4
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.strip().splitlines()) == 1


def test_the_command_writes_one_report_and_its_exit_code(saved, capsys):
    folder = saved("lora", STARTS_AT_ZERO["lora"])
    assert main.run(["adapter", str(folder), "--base", "tiny:llama", "--select", "KB806,KB810"]) == 1
    out = capsys.readouterr().out
    assert "KB806 adapter-moved" in out
    assert "rank 4" in out
    assert main.run(["adapter", str(folder), "--base", "no:such"]) == 4
    assert main.run(["adapter", str(folder.parent)]) == 4
    assert re.search("there is one in|directories in it have one", capsys.readouterr().err)
    assert main.run(["adapter", str(folder), "--select", "KB801", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["pass"] == 1


def test_files_alone_are_judged_without_transformers(saved):
    """An import of it takes longer than all that is read."""
    folder = saved("lora", STARTS_AT_ZERO["lora"])
    code = (
        f"import sys; from kbitcheck.run.saved_adapter import judge; judge(__import__('pathlib').Path({str(folder)!r}))"
    )
    code += "; sys.exit('transformers' in sys.modules or 'torch' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_rules_about_models_are_not_about_adapters(saved):
    with pytest.raises(UsageError, match="is not about an adapter"):
        judge(saved("lora", STARTS_AT_ZERO["lora"]), select_codes=["KB101"])
    assert main.run(["model", "tiny:llama", "--static", "--select", "KB806"]) == 4


LORA: dict[str, Any] = {"r": 4, "target_modules": TARGETS}
WHOLE = {
    "a head": (peft.LoraConfig(**LORA, modules_to_save=["lm_head"]), "KB807"),
    "tokens": (peft.LoraConfig(**LORA, trainable_token_indices=[7, 3]), "KB807"),
    "a start that no file keeps": (
        peft.LoraConfig(**LORA, init_lora_weights="pissa", modules_to_save=["lm_head"]),
        "KB807",
    ),
    "norms": (peft.LNTuningConfig(target_modules=["input_layernorm"]), "KB806"),
    "tokens alone": (peft.TrainableTokensConfig(token_indices=[5, 1], target_modules=["embed_tokens"]), "KB806"),
}


def move(model: Any, which: str = "") -> Any:
    """A model of PEFT's whose trainable parameters with ``which`` in their names moved."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and which in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", WHOLE)
def test_what_trains_whole_is_told_from_the_bases_own(name, tmp_path):
    config, code = WHOLE[name]
    model: Any = move(peft.get_peft_model(resolve("tiny:llama").load_unquantized().float(), config), "lora_")
    model.save_pretrained(tmp_path / "still")
    move(model).save_pretrained(tmp_path / "moved")
    codes = ["KB801", "KB806", "KB807", "KB809", "KB810"]
    still, moved = (judge(tmp_path / which, base="tiny:llama", select_codes=codes) for which in ("still", "moved"))
    assert [result.rule for result in still if result.failures] == [code]
    assert "as in the base" in str(still)
    assert [result.rule for result in moved if result.failures] == []
    assert statuses(moved)[code] is Status.PASS
    assert "off the base's" in str(moved)
    assert statuses(judge(tmp_path / "still", select_codes=["KB806"]))["KB806"] is not Status.FAIL


def test_the_reach_of_what_trains_whole_is_what_is_stored(tmp_path):
    config = peft.LoraConfig(**LORA, modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    peft.get_peft_model(base(), config).save_pretrained(tmp_path)
    (note,) = next(r.notes for r in judge(tmp_path, base="tiny:llama", select_codes=["KB801"]))
    assert "100% head" in note
    assert "1% embeddings" in note  # two of 261 rows


@pytest.fixture
def with_head(saved, tmp_path):
    """Files of an adapter with a head that trains whole, whose tensors and configuration a test changes."""
    config = peft.LoraConfig(**LORA, modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    folder = shutil.copytree(saved("head and tokens", config), tmp_path / "adapter")

    def change(key="", tensor=lambda t: t, **fields):
        tensors = load_file(folder / WEIGHTS)
        save_file({k: tensor(t).contiguous() if key and key in k else t for k, t in tensors.items()}, folder / WEIGHTS)
        stated = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**stated, **fields}))
        return judge(folder, base="tiny:llama", select_codes=["KB809", "KB810"])

    return change


def test_a_tensor_stored_whole_has_the_shape_of_the_bases(with_head):
    assert set(statuses(with_head()).values()) == {Status.PASS}
    narrow = with_head("lm_head", lambda head: head[:, 1:])
    assert statuses(narrow)["KB810"] is Status.FAIL
    assert "261 by 107" in str(narrow)


def test_a_head_with_more_tokens_needs_a_base_that_is_resized(with_head):
    report = with_head("lm_head", lambda head: torch.cat([head, head[:3]]))
    assert statuses(report)["KB810"] is Status.PASS
    assert "resize_token_embeddings(264)" in str(report)


def test_a_head_of_a_task_is_no_module_of_the_base(with_head, saved, tmp_path):
    assert statuses(with_head(task_type="SEQ_CLS"))["KB810"] is Status.PASS
    folder = shutil.copytree(saved("lora", STARTS_AT_ZERO["lora"]), tmp_path / "scores")
    score = {"base_model.model.score.weight": torch.ones(2, 108)}
    save_file(load_file(folder / WEIGHTS) | score, folder / WEIGHTS)
    stated = json.loads((folder / CONFIG).read_text()) | {"modules_to_save": ["score"]}
    for task, status in (("SEQ_CLS", Status.PASS), ("CAUSAL_LM", Status.FAIL)):
        (folder / CONFIG).write_text(json.dumps({**stated, "task_type": task}))
        assert statuses(judge(folder, base="tiny:llama", select_codes=["KB810"]))["KB810"] is status


def test_tokens_that_train_have_a_row_each_in_file_and_base(with_head):
    assert statuses(with_head(trainable_token_indices=[1, 2, 3]))["KB809"] is Status.FAIL
    assert statuses(with_head(trainable_token_indices={"embed_tokens": [1, 260]}))["KB810"] is Status.PASS
    beyond = with_head(trainable_token_indices=[1, 261])
    assert (statuses(beyond)["KB809"], statuses(beyond)["KB810"]) == (Status.PASS, Status.FAIL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter of ``tiny:llama`` whose deltas are a tenth of the weights', and its report beside the base."""
    folder = tmp_path_factory.mktemp("trained")
    model: Any = peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return folder


def test_a_merge_adds_each_delta_once_and_tells_what_is_lost(trained):
    report = judge(trained, base="tiny:llama")
    assert (statuses(report)["KB804"], report.exit_code) == (Status.PASS, 0), str(report)
    (facts,) = report.facts["cases"].values()
    merge = facts["adapter"]["merge"]
    assert merge["layers"] == 8
    assert merge["errors"]["on nf4"] < merge["effect"]
    # Packed weights lie on a grid that these deltas do not leave.
    assert merge["errors"]["merged into nf4"] > 4 * merge["errors"]["merged into the unpacked weights in bfloat16"]
    assert "merged into nf4" in str(report)


def test_a_layer_that_a_merge_leaves_out_is_named(trained):
    case = AdapterCase(trained, base="tiny:llama", merging=lambda layer: None)
    result = core_judge(rules()["KB804"], case)
    assert [failure.actual for failure in result.failures] == ["0 times that"] * 8


@pytest.mark.transformers5("before it, experts are modules of their own")
def test_an_expert_that_a_merge_leaves_out_is_named(tmp_path):
    config = peft.LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"], target_modules=[])
    model: Any = peft.get_peft_model(base("tiny:mixtral"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path)

    def merging(layer):
        first = layer.get_param()[0].clone()
        layer.merge()
        layer.get_param().data[0] = first

    case = AdapterCase(tmp_path, base="tiny:mixtral", merging=merging)
    places = {f.where: f.actual for f in core_judge(rules()["KB804"], case).failures if "times" in f.actual}
    assert set(places.values()) == {"0 times that"}
    assert {place.partition(", ")[2] for place in places} == {"expert 0"}


def test_what_trains_whole_is_followed_through_a_merge(tmp_path):
    config = peft.LoraConfig(**LORA, modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    move(peft.get_peft_model(resolve("tiny:llama").load_unquantized().float(), config)).save_pretrained(tmp_path)
    whole = {"lm_head.weight", "model.embed_tokens.weight"}
    case = AdapterCase(tmp_path, base="tiny:llama", merging=lambda module: None)
    left_out = {f.where: f.actual for f in core_judge(rules()["KB804"], case).failures}
    assert {left_out[name] for name in whole} == {"0 times that"}
    sound = AdapterCase(tmp_path, base="tiny:llama")
    assert core_judge(rules()["KB804"], sound).status is Status.PASS
    assert whole < {layer.module for layer in sound.merge.layers}


def test_half_of_a_tie_that_trains_is_noted(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["wte"], fan_in_fan_out=True)
    move(peft.get_peft_model(resolve("tiny:gpt2").load_unquantized().float(), config)).save_pretrained(tmp_path)
    result = core_judge(rules()["KB804"], AdapterCase(tmp_path, base="tiny:gpt2"))
    assert result.status is Status.PASS
    assert any("ties lm_head.weight to transformer.wte.weight" in note for note in result.notes)


def test_a_base_without_weights_is_compared_and_not_merged(saved, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(resolve("tiny:llama").config)))
    report = judge(saved("lora", STARTS_AT_ZERO["lora"]), base=str(tmp_path / "config.json"))
    assert (statuses(report)["KB810"], statuses(report)["KB804"]) == (Status.PASS, Status.SKIP)


def test_a_base_that_is_too_large_for_this_machine_is_compared_and_not_merged(trained, monkeypatch):
    monkeypatch.setattr("kbitcheck.observe.device.free_bytes", lambda device: 1 << 20)
    report = judge(trained, base="tiny:llama")
    assert "are free" in next(result.reason for result in report if result.rule == "KB804")
