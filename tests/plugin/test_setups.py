"""``assert_prepared`` on what people really train: other adapters, heads of their own, models without a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import kbitcheck
from kbitcheck.core.report import Report
from kbitcheck.core.result import Party, Result, Status
from kbitcheck.core.training import Training
from kbitcheck.models.inputs.wrapped import batch_inside
from kbitcheck.observe.meant_to_train import declared
from kbitcheck.observe.probes import layers
from kbitcheck.observe.probes.float64 import KeepFloat64
from kbitcheck.observe.probes.loss import GiveLoss, drawn_loss
from kbitcheck.observe.twin import twins
from tests.few_steps import MANY_STEPS, of_few_steps
from tests.plugin.traces import everything

peft = pytest.importorskip("peft")

NF4 = transformers.BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
INT8 = transformers.BitsAndBytesConfig(load_in_8bit=True)
# The rules that need a gradient and a twin.
GRADIENTS = ("KB105", "KB302", "KB303", "KB304", "KB904")
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def config(**more: Any) -> Any:
    sizes = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    return transformers.LlamaConfig(**{**sizes, **more})


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives a fresh quantized model of random weights."""
    kept: dict[Any, Any] = {}

    def load(cfg: Any, auto: Any = transformers.AutoModelForCausalLM, quant: Any = NF4) -> Any:
        key = (str(cfg.to_dict()), auto.__name__, id(quant))
        if key not in kept:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("model")
            auto.from_config(cfg).to(torch.bfloat16).save_pretrained(folder)
            kept[key] = auto.from_pretrained(folder, quantization_config=quant, dtype=torch.bfloat16)
        return copy.deepcopy(kept[key])

    return load


def prepared(model: Any, adapters: Any = None, **options: Any) -> Any:
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}, **options}
    model = peft.prepare_model_for_kbit_training(model, **options)
    return model if adapters is None else peft.get_peft_model(model, adapters)


def judged(model: Any, **options: Any) -> Report:
    """The report, whatever its verdict; the model is as it was."""
    before = everything(model)
    try:
        report = kbitcheck.assert_prepared(model, **{"select": of_few_steps(), **options})
    except kbitcheck.NonConformance as error:
        report = error.report
    assert everything(model) == before
    return report


def results(report: Report) -> dict[str, Result]:
    return {result.rule: result for result in report}


def assert_judged(report: Report, *codes: str) -> None:
    """No rule is broken or an error, and these were judged."""
    by_rule = results(report)
    assert report.exit_code == 0, str(report)
    assert {code: by_rule[code].reason for code in codes if by_rule[code].status is not Status.PASS} == {}


ADAPTERS = {
    "dora": lambda: peft.LoraConfig(use_dora=True, **LORA),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "layer norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "embeddings": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj", "embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_other_kinds_are_judged(loads: Any, name: str) -> None:
    report = judged(prepared(loads(config()), ADAPTERS[name]()), select=[*GRADIENTS, "KB907"])
    assert_judged(report, *GRADIENTS, "KB907")


def test_a_head_that_is_trained_beside_a_base_that_nobody_cast(loads: Any) -> None:
    model = peft.get_peft_model(loads(config()), peft.LoraConfig(modules_to_save=["lm_head"], **LORA))
    assert_judged(judged(model, select=GRADIENTS), *GRADIENTS)


def test_a_trained_head_that_is_too_large_to_be_widened_whole(loads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "LARGE_BYTES", 0)
    model = peft.get_peft_model(loads(config()), peft.LoraConfig(modules_to_save=["lm_head"], **LORA))
    assert_judged(judged(model, select=GRADIENTS), *GRADIENTS)


def test_no_verdict_rests_on_a_twin_whose_loss_is_no_number(loads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(loads(config()), ADAPTERS["dora"]())
    exact = layers.Weights.exact
    monkeypatch.setattr(layers.Weights, "exact", lambda self, name: exact(self, name) * torch.nan)
    report = judged(model, select=["KB304"])
    assert (report.exit_code, results(report)["KB304"].status) == (3, Status.ERROR)


def stepped(model: Any) -> Any:
    """The model after a training step under autocast."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.arange(2, 34).view(2, 16)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


def test_the_biases_of_quantized_layers_in_the_middle_of_training(loads: Any) -> None:
    """bitsandbytes recast them: no fault of the caller, and told once."""
    report = judged(
        stepped(prepared(loads(config(attention_bias=True)), peft.LoraConfig(**LORA))), select=["KB1", "KB2"]
    )
    assert_judged(report, "KB202")
    assert str(report).count("recasts a quantized layer's bias") == 1


def test_biases_that_train_in_half_precision_are_told_loudly(loads: Any) -> None:
    adapters = peft.LoraConfig(bias="all", **LORA)
    model = stepped(prepared(loads(config(attention_bias=True)), adapters))
    report = judged(model, select=["KB102", "KB202", *GRADIENTS])
    assert_judged(report, "KB102", *GRADIENTS)
    (party,) = {failure.party for failure in results(report)["KB202"].failures}
    assert party is Party.STACK
    assert "this bias trains in bfloat16" in str(report).replace("\n     ", "")


def test_a_prompt_is_no_adapter_inside_a_tower(loads: Any) -> None:
    adapters = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    report = judged(prepared(loads(config()), adapters, gradient_checkpointing_kwargs={"use_reentrant": True}))
    assert_judged(report, *GRADIENTS)
    assert results(report)["KB301"].reason == "no adapter is inside a tower"


def test_an_adapter_that_was_loaded_for_inference(loads: Any, tmp_path: Any) -> None:
    prepared(loads(config()), peft.LoraConfig(**LORA)).save_pretrained(tmp_path)
    base = prepared(loads(config()))
    report = judged(peft.PeftModel.from_pretrained(base, tmp_path), select=["KB1", "KB2"])
    assert (report.exit_code, results(report)["KB102"].failures[0].actual) == (
        1,
        "nothing trains: adapters are off, or were loaded without is_trainable=True",
    )
    assert results(report)["KB211"].reason == "no parameter is trainable"
    again = peft.PeftModel.from_pretrained(prepared(loads(config())), tmp_path, is_trainable=True)
    assert_judged(judged(again, select=["KB102"]), "KB102")


@pytest.mark.parametrize("active", ["default", "reference"])
def test_of_several_adapters_the_active_one_trains(loads: Any, active: str) -> None:
    model = prepared(loads(config()), peft.LoraConfig(**LORA))
    model.add_adapter("reference", peft.LoraConfig(**LORA))
    model.set_adapter(active)
    assert_judged(judged(model, select=["KB102", *GRADIENTS]), "KB102", *GRADIENTS)


def test_a_compiled_model_is_judged_as_the_model_inside(loads: Any) -> None:
    model = prepared(loads(config()), peft.LoraConfig(**LORA))
    report = kbitcheck.assert_prepared(torch.compile(model), select=["KB102", "KB302", "KB403"])
    assert_judged(report, "KB102", "KB302", "KB403")


class WithValueHead(nn.Module):
    """A model with a second head, which returns a tuple, as TRL's wrapper for PPO does."""

    def __init__(self, pretrained_model: Any) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.v_head = nn.Linear(64, 1)

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("labels", None)
        out = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return out.logits, out.loss, self.v_head(out.hidden_states[-1].float()).squeeze(-1)


def test_a_value_head_around_the_model(loads: Any) -> None:
    model = WithValueHead(prepared(loads(config()), peft.LoraConfig(**LORA)))
    report = judged(model, trains=["v_head"])
    assert_judged(report, "KB101", "KB102", "KB103", "KB104", "KB215", "KB305", "KB309", "KB403", *GRADIENTS)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    assert_judged(
        judged(model, trains=["v_head"], select=["KB215"]), "KB215"
    )  # the head is no adapter in another dtype
    undeclared = judged(model, select=["KB101", "KB102"])
    assert {r.rule for r in undeclared if r.status is Status.FAIL} == {"KB101", "KB102"}
    model.v_head.requires_grad_(False)
    assert results(judged(model, trains=["v_head"], select=["KB102"]))["KB102"].status is Status.FAIL


def llava(loads: Any) -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    whole = transformers.LlavaConfig(
        vision_config=vision, text_config=config(), image_token_index=127, image_seq_length=4
    )
    skip = ["lm_head", "model.multi_modal_projector", "model.vision_tower"]
    quant = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    model = prepared(loads(whole, transformers.AutoModelForImageTextToText, quant))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name and parameter.is_floating_point())
    return model


@pytest.mark.transformers5("names of modules that are left unquantized")
def test_the_projector_alone_is_trained(loads: Any) -> None:
    report = judged(llava(loads), trains=["multi_modal_projector"])
    assert_judged(report, "KB101", "KB102", "KB103", "KB104", "KB305", "KB309", *GRADIENTS)


def test_parts_that_are_meant_to_train_have_a_name(loads: Any) -> None:
    model = prepared(loads(config()))
    for name in ("v_head", "q_proj"):
        with pytest.raises(kbitcheck.UsageError, match=f"trains='{name}': the model has no unquantized parameter"):
            kbitcheck.assert_prepared(model, trains=[name])


def test_tokens_that_train_alone_are_in_the_batch(loads: Any) -> None:
    adapters = peft.LoraConfig(trainable_token_indices={"embed_tokens": [5, 77, 126]}, **LORA)
    model = prepared(loads(config()), adapters)
    drawn = batch_inside(model, batch=2, seq_len=24, seed=0)
    assert {5, 77, 126} <= set(drawn["input_ids"][0].tolist())
    assert torch.equal(drawn["input_ids"][0], drawn["labels"][0])
    assert_judged(judged(model, select=GRADIENTS), *GRADIENTS)


def embedding_model(loads: Any) -> Any:
    adapters = peft.LoraConfig(r=4, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    return prepared(loads(config(), transformers.AutoModel), adapters)


def test_an_embedding_model_gets_a_loss(loads: Any) -> None:
    assert_judged(judged(embedding_model(loads)), "KB103", "KB104", "KB305", "KB309", "KB403", "KB405", *GRADIENTS)


def test_an_audit_is_told_how_the_model_trains(loads: Any) -> None:
    """The same loss, parts and optimizer as for ``assert_prepared``."""

    def pooled(output: Any) -> Any:
        return output[2].square().mean() + output[0].float().logsumexp(-1).mean()

    model = WithValueHead(loads(config()))
    optimizer = torch.optim.AdamW(model.v_head.parameters(), lr=0.0)
    codes = ["KB101", "KB102", "KB302", "KB304", "KB71"]
    before = everything(model, optimizer.state_dict())
    report = kbitcheck.audit(
        model, prepare="peft", loss=pooled, trains=["v_head"], optimizer=optimizer, select=codes, allow_step=True
    )
    assert everything(model, optimizer.state_dict()) == before
    by_rule = results(report)
    assert [code for code in codes[:4] if by_rule[code].status is not Status.PASS] == []
    assert (by_rule["KB710"].status, by_rule["KB712"].status) == (Status.PASS, Status.FAIL)
    judged_adapters = by_rule["KB302"].examined
    alone = kbitcheck.audit(model, prepare="peft", loss=pooled, select=["KB302", "KB71"])
    assert results(alone)["KB302"].examined == judged_adapters - 2  # weight and bias of the head
    assert results(alone)["KB712"].reason == "needs steps of your own training: `kbitcheck watch`"


def test_a_trainer_in_place_of_a_model_is_audited(loads: Any, tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], learning_rate=1e-4)
    trainer = transformers.Trainer(prepared(loads(config()), peft.LoraConfig(**LORA)), arguments)
    report = kbitcheck.audit(trainer, prepare="reference", select=["KB103", "KB711", "KB712"])
    assert {r.rule: r.status for r in report} == dict.fromkeys(["KB103", "KB711", "KB712"], Status.PASS)


@pytest.mark.parametrize("name", ["v_head", "v_head.weight"])
def test_a_part_is_named_by_whole_words_of_its_path(loads: Any, name: str) -> None:
    model = WithValueHead(prepared(loads(config()), peft.LoraConfig(**LORA)))
    for check in (kbitcheck.watch, kbitcheck.assert_prepared, kbitcheck.audit):
        with pytest.raises(kbitcheck.UsageError, match="the model has no unquantized parameter of that name"):
            check(model, trains=[name.replace("head", "hea")])
    assert {n.partition("v_head.")[2] for n in declared(model, Training(trains=[name]))} == (
        {"weight"} if "." in name else {"weight", "bias"}
    )


@pytest.mark.transformers5("SigLIP needs batch= there")
def test_a_model_of_images_and_texts_without_a_loss(loads: Any) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    two_towers = transformers.SiglipConfig(
        text_config={"vocab_size": 128, "max_position_embeddings": 32, "projection_size": 64, **ends, **sizes},
        vision_config={"image_size": 16, "patch_size": 8, **sizes},
    )
    quant = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["head", "vision_model.head", "text_model.head"],
    )  # fmt: skip
    model = prepared(
        loads(two_towers, transformers.AutoModel, quant), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    report = judged(model, select=["KB1", "KB305", *GRADIENTS])
    assert_judged(report, "KB103", "KB305", *GRADIENTS)
    inputs = next(iter(report.facts["cases"].values()))["inputs"]
    assert inputs == "text, images"


def with_adapters(name: str, loads: Any) -> Any:
    return prepared(loads(config()), ADAPTERS[name]())


SETUPS: dict[str, Callable[[Any], Any]] = {
    **{name: partial(with_adapters, name) for name in ADAPTERS},
    "prompt": lambda loads: prepared(
        loads(config()),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        gradient_checkpointing_kwargs={"use_reentrant": True},
    ),
    "value head": lambda loads: WithValueHead(prepared(loads(config()), peft.LoraConfig(**LORA))),
    "embedding model": embedding_model,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETUPS)
def test_no_setup_breaks_a_rule_of_many_steps(loads: Any, name: str) -> None:
    trains = {"trains": ["v_head"]} if name == "value head" else {}
    assert_judged(judged(SETUPS[name](loads), select=MANY_STEPS, **trains), "KB311")


def test_the_loss_of_the_caller(loads: Any) -> None:
    model, seen = embedding_model(loads), []

    def pooled(output: Any) -> Any:
        seen.append(type(output).__name__)
        vectors = nn.functional.normalize(output.last_hidden_state.mean(1), dim=-1)
        return (vectors @ vectors.T).logsumexp(-1).mean()

    report = judged(model, loss=pooled, batch={"input_ids": torch.arange(2, 34).view(2, 16)})
    assert_judged(report, "KB305", *GRADIENTS)
    assert set(seen) == {"BaseModelOutputWithPast"}
    with pytest.raises(kbitcheck.UsageError, match="loss= returns float, not one number in a tensor"):
        kbitcheck.assert_prepared(model, loss=lambda output: 1.0)


def test_what_does_not_run_is_told_once(loads: Any) -> None:
    class Broken(WithValueHead):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            raise AttributeError("no such thing")

    report = judged(Broken(prepared(loads(config()), peft.LoraConfig(**LORA))), trains=["v_head"])
    assert report.exit_code == 3
    reasons = {r.reason for r in report if r.status is Status.ERROR}
    assert len(reasons) == 1
    assert "no such thing" in reasons.pop()


def test_a_loss_is_drawn_from_every_tensor() -> None:
    one, two = (torch.ones(2, 3, requires_grad=True) for _ in range(2))
    drawn_loss([one, two.bfloat16()]).backward()
    for tensor in (one, two):
        assert tensor.grad is not None
        assert len(tensor.grad.unique()) > 1
        assert bool((tensor.grad > 0).all())
    assert one.grad is not None
    assert two.grad is not None
    assert not torch.equal(one.grad, two.grad)


def test_whose_loss_is_taken() -> None:
    give, module = GiveLoss(), nn.Identity()
    own = transformers.modeling_outputs.CausalLMOutput(loss=torch.ones(()), logits=torch.zeros(2))
    assert give(module, (), own) is own
    assert give(module, (), (torch.full((), 3.0), torch.zeros(2))).loss == 3
    assert give(module, (), (torch.zeros(2), torch.ones(2))).loss > 0
    assert GiveLoss(lambda output: output.logits.sum() + 7)(module, (), own).loss == 7


def test_float64_is_kept_where_code_asks_for_less() -> None:
    double, single = torch.ones(2, dtype=torch.float64), torch.ones(2)
    with KeepFloat64():
        kept = [
            double.float(),
            double.to(torch.float32),
            double.to(dtype=torch.bfloat16),
            double.softmax(0, dtype=torch.float32),
        ]
        kept += [torch.softmax(double, 0, dtype=torch.float32), double.sum(dtype=torch.float32)]
        kept += [double.int().float(), double.int().to(torch.float32), torch.zeros(2), torch.eye(2, device="cpu")]
        others = [double.int(), double.to(torch.int64), single.bfloat16(), single.double()]
        others += [torch.ones(2, dtype=torch.float32)]
    assert {tensor.dtype for tensor in kept} == {torch.float64}
    assert [tensor.dtype for tensor in others] == [
        torch.int32,
        torch.int64,
        torch.bfloat16,
        torch.float64,
        torch.float32,
    ]


def in_bfloat16(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


def adamw(model: Any, rate: float = 2e-5) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)


def test_updates_that_bfloat16_rounds_away_are_counted_on_steps_of_the_optimizer(loads: Any) -> None:
    model = in_bfloat16(peft.get_peft_model(loads(config()), peft.LoraConfig(**LORA)))
    optimizer = adamw(model)
    for state in ("before it took a step", "in the middle of training"):
        before = everything(model, optimizer.state_dict(), vars(optimizer))
        report = kbitcheck.assert_prepared(model, optimizer=optimizer, select=["KB1", "KB313", "KB7", *GRADIENTS])
        assert everything(model, optimizer.state_dict(), vars(optimizer)) == before, state
        (result,) = (r for r in report if r.rule == "KB313")
        assert result.status is Status.FAIL
        assert not report.counts(result)
        assert {f.where.partition("lora_")[2][0] for f in result.failures} >= {"A"}
        assert "nine of ten would land at a learning rate of" in result.failures[0].actual
        model.train()
        model(input_ids=torch.arange(2, 34).view(2, 16), labels=torch.arange(2, 34).view(2, 16)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_schedule_that_has_run_out_is_no_fault(loads: Any) -> None:
    model = in_bfloat16(peft.get_peft_model(loads(config()), peft.LoraConfig(**LORA)))
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    report = judged(model, optimizer=optimizer, select=["KB313", "KB71"])
    assert (report.exit_code, results(report)["KB712"].status) == (0, Status.PASS)
    assert "not 2e-05" in results(report)["KB313"].failures[0].actual
    assert schedule.get_last_lr() == [0.0]


def test_in_float32_every_update_lands(loads: Any) -> None:
    model = prepared(loads(config()), peft.LoraConfig(**LORA))
    report = judged(model, optimizer=adamw(model), select=["KB313", "KB7"])
    assert results(report)["KB313"].reason == "nothing that trains is in half precision"
    assert_judged(report, "KB710", "KB711", "KB712", "KB713", "KB715")


def test_without_an_optimizer_rounding_is_a_forecast_and_no_failure(loads: Any) -> None:
    model = in_bfloat16(peft.get_peft_model(loads(config()), peft.LoraConfig(**LORA)))
    report = judged(model, select=["KB313", "KB7"], strict=True)
    assert_judged(report, "KB313")
    assert "KB710" in {r.rule for r in report if "needs your optimizer" in r.reason}
    told = " ".join(str(report).split())
    assert "forecast: with AdamW at a learning rate of 2e-05, bfloat16 would round away" in told
    faster = " ".join(str(judged(model, select=["KB313"], learning_rate=0.1)).split())
    assert "learning rate of 0.1, bfloat16 would round away 0%" in faster


def test_an_optimizer_that_holds_no_adapter_is_named(loads: Any) -> None:
    model = prepared(loads(config()), peft.LoraConfig(**LORA))
    report = judged(model, optimizer=torch.optim.AdamW([nn.Parameter(torch.zeros(2))]), select=["KB710"])
    assert results(report)["KB710"].status is Status.FAIL


def test_a_trainer_brings_its_model_and_its_optimizer(loads: Any, tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    model = in_bfloat16(peft.get_peft_model(loads(config()), peft.LoraConfig(**LORA)))
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], learning_rate=1e-4)
    trainer = transformers.Trainer(model, arguments)
    before = everything(trainer.model)
    report = kbitcheck.assert_prepared(trainer, select=["KB313", "KB710"])
    assert everything(trainer.model) == before
    assert trainer.optimizer is None
    by_rule = results(report)
    assert by_rule["KB710"].status is Status.PASS
    assert "not 0.0001" in by_rule["KB313"].failures[0].actual


def test_in_the_middle_of_a_trainers_run(loads: Any, tmp_path: Any) -> None:
    """As TRL prepares models by default; the check changes no bit of model, optimizer and random states."""
    pytest.importorskip("accelerate")
    model = in_bfloat16(peft.get_peft_model(loads(config()), peft.LoraConfig(**LORA)))
    reports: list[Report] = []

    class Check(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            optimizer: Any = getattr(trainer.optimizer, "optimizer", None)
            before = everything(trainer.model, optimizer.state_dict(), vars(optimizer))
            reports.append(kbitcheck.assert_prepared(trainer, select=["KB1", "KB2", "KB313", "KB71", *GRADIENTS]))
            assert everything(trainer.model, optimizer.state_dict(), vars(optimizer)) == before

    ids = torch.arange(2, 34).view(2, 16)
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, bf16=True, max_steps=2, report_to=[], save_strategy="no", learning_rate=2e-5
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Check()])
    trainer.train()
    reports.append(kbitcheck.assert_prepared(trainer, select=["KB1", "KB2", "KB313", "KB71"]))
    for report in reports:
        assert {r.rule for r in report if r.status is Status.FAIL} == {"KB313"}
        assert "dtypes as TRL prepares them: nothing upcast, adapters bf16, autocast" in " ".join(str(report).split())
