"""Training runs as users write them, sound and broken: each is a function that trains, and calls nothing of kbitcheck."""

import tempfile
import warnings

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig


def load(*, scheme="nf4", layers=2, compute=torch.bfloat16, quantization=None, **config):
    """A tiny quantized model, loaded from a checkpoint."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0, **config,
    }  # fmt: skip
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).bfloat16()
    quantization = quantization or (
        BitsAndBytesConfig(load_in_8bit=True)
        if scheme == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=scheme, bnb_4bit_compute_dtype=compute)
    )
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.bfloat16
        )


def lora(**fields):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields})


def prepared(*, adapters=None, **options):
    return get_peft_model(prepare_model_for_kbit_training(load(**options)), adapters or lora())


def trained_by(model):
    return [p for p in model.parameters() if p.requires_grad]


def batches(count, *, rows=2, length=24):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        ids = torch.randint(1, 256, (rows, length), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def loop(
    model,
    optimizer,
    *,
    steps=4,
    accumulate=1,
    divide=1,
    labels=None,
    scaler=None,
    schedule=None,
    between=None,
    **passed,
):
    """A plain loop; returns the losses."""
    model.train()
    losses = []
    for step, batch in enumerate(batches(steps * accumulate)):
        if labels is not None:
            batch["labels"] = torch.full_like(batch["labels"], labels)
        loss = model(**batch, **passed).loss
        losses.append(loss.detach().clone())
        scaled = loss / divide if scaler is None else scaler.scale(loss / divide)
        scaled.backward()
        if (step + 1) % accumulate == 0:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            if schedule is not None:
                schedule.step()
            optimizer.zero_grad()
            if between is not None:
                between(model)
                model.train()
    return losses


def adamw(model, rate=1e-3, **options):
    return torch.optim.AdamW(trained_by(model), lr=rate, **options)


def plain():
    model = prepared()
    return model, adamw(model), {}


def int8():
    model = prepared(scheme="int8")
    return model, adamw(model), {}


def dropout():
    model = prepared(adapters=lora(lora_dropout=0.1))
    return model, adamw(model), {}


def accumulated():
    model = prepared()
    return model, adamw(model), {"accumulate": 4, "divide": 4}


def warmed_up():
    model = prepared()
    optimizer = adamw(model)
    return model, optimizer, {"schedule": transformers.get_linear_schedule_with_warmup(optimizer, 2, 100)}


def without_checkpointing():
    model = get_peft_model(prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False), lora())
    model.config.use_cache = False
    return model, adamw(model), {}


def reentrant():
    kwargs = {"use_reentrant": True}
    model = prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs=kwargs)
    model = get_peft_model(model, lora())
    return model, adamw(model), {}


def head_saved():
    model = prepared(adapters=lora(modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"]))
    return model, adamw(model), {}


def dora():
    model = prepared(adapters=lora(use_dora=True))
    return model, adamw(model), {}


def autocast_over_float32():
    """As ``trl sft`` trains: layers that compute in float32, under autocast to bfloat16."""
    model = prepared(compute=torch.float32)
    own = model.forward
    model.forward = lambda *args, **kwargs: torch.autocast("cpu", torch.bfloat16)(own)(*args, **kwargs)
    return model, adamw(model), {}


def checkpointing_passed_again():
    """As axolotl does: a call without arguments is followed by its trainer's with them."""
    kwargs = {"use_reentrant": True}
    model = get_peft_model(prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs=kwargs), lora())

    def first():
        model.gradient_checkpointing_enable()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    return model, adamw(model), {"first": first}


# Runs in which nothing is wrong.
SOUND = (
    plain, int8, dropout, accumulated, warmed_up, without_checkpointing, reentrant, checkpointing_passed_again,
    autocast_over_float32, head_saved, dora,
)  # fmt: skip


def optimizer_before_adapters():
    base = prepare_model_for_kbit_training(load())
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.is_floating_point()], lr=1e-3)
    return get_peft_model(base, lora()), optimizer, {}


def adapters_frozen_by_a_second_call():
    model = prepared()
    optimizer = adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = get_peft_model(model.base_model.model, lora(), adapter_name="second")
    for name, parameter in second.named_parameters():
        if ".default." in name:
            parameter.requires_grad_(False)
    return second, optimizer, {}


def checkpointing_switched_on_again():
    kwargs = {"use_reentrant": True, "preserve_rng_state": False}
    model = get_peft_model(prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs=kwargs), lora())
    return model, adamw(model), {"first": lambda: model.gradient_checkpointing_enable()}


def head_trains_instead_of_its_copy():
    model = head_saved()[0]
    head = model.get_submodule("base_model.model.lm_head")
    head.original_module.weight.requires_grad_(True)
    model.set_adapter("default")
    head.original_module.weight.requires_grad_(True)
    head.modules_to_save["default"].weight.requires_grad_(False)
    head._disable_adapters = True
    return model, adamw(model), {}


def labels_ignored():
    model = prepared()
    return model, adamw(model), {"labels": -100}


def rate_zero():
    model = prepared()
    return model, adamw(model, 0.0), {}


def _rewrite(model):
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight.data = module.weight.data.roll(1, 0)
            return


def evaluation_repacks():
    model = prepared()
    return model, adamw(model), {"between": _rewrite}


def divided_twice():
    model = prepared()
    return model, adamw(model), {"accumulate": 4, "divide": 16}


def fp16_under_a_scaler():
    model = prepared()
    for parameter in trained_by(model):
        parameter.data = parameter.data.half()
    return model, adamw(model, eps=1e-4), {}


def cache_with_checkpointing():
    model = prepared()
    return model, adamw(model), {"use_cache": True}


def rounded_away():
    model = prepared()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    return model, adamw(model, 2e-5), {}


def magnitudes_stand_still():
    model = dora()[0]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    return model, adamw(model, 2e-5), {}


def half_of_the_norms_cast():
    model = prepared(layers=3)
    for name, module in model.named_modules():
        if name.endswith("input_layernorm"):
            module.weight.data = module.weight.data.bfloat16()
    return model, adamw(model), {}


class _Cut(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs).detach()


def adapters_without_gradient():
    model = without_checkpointing()[0]
    for name in [name for name, _ in model.named_modules()]:
        if name.endswith("layers.0.self_attn.q_proj.lora_A.default"):
            model.set_submodule(
                name.removesuffix("lora_A.default") + "lora_B.default",
                _Cut(model.get_submodule(name.removesuffix("lora_A.default") + "lora_B.default")),
            )
    return model, adamw(model), {}


def cut_hidden_by_the_residual_stream():
    model = prepared()
    for block in model.base_model.model.model.layers:
        block.mlp.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    return model, adamw(model), {}


def infinite_loss():
    model = prepared()
    with torch.no_grad():
        model.get_submodule("base_model.model.model.norm").weight.fill_(float("inf"))
    return model, adamw(model), {}


# Each run with the rule that must name it.
BROKEN = {
    optimizer_before_adapters: "KB710",
    adapters_frozen_by_a_second_call: "KB710",
    checkpointing_switched_on_again: "KB703",
    head_trains_instead_of_its_copy: "KB710",
    labels_ignored: "KB714",
    infinite_loss: "KB713",
    rate_zero: "KB712",
    evaluation_repacks: "KB104",
    divided_twice: "KB707",
    fp16_under_a_scaler: "KB211",
    cache_with_checkpointing: "KB716",
    rounded_away: "KB313",
    magnitudes_stand_still: "KB711",
    half_of_the_norms_cast: "KB215",
    adapters_without_gradient: "KB715",
    cut_hidden_by_the_residual_stream: "KB304",
}
