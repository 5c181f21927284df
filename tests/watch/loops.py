"""Loops and models that training runs share: each trains as a user would, and calls nothing of kbitcheck."""

import contextlib
import copy
import tempfile
from typing import Any

import torch
import transformers
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn

from tests.watch.runs import adamw, batches, load, lora, prepared, trained_by

STEPS = 4


def plain_step(model, optimizer, batch, *, clip=None):
    loss = model(**batch).loss
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(trained_by(model), clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def each_step(model, optimizer, *, between=lambda model, step: None, **options):
    """The losses of a plain loop; ``between`` runs after each step."""
    model.train()
    losses = []
    for step, batch in enumerate(batches(STEPS)):
        losses.append(plain_step(model, optimizer, batch, **options))
        between(model, step)
    return losses


def scaled(
    model,
    optimizer,
    *,
    scale=2.0**10,
    clip=None,
    unscale=True,
    accumulate=1,
    growth=2000,
    dtype=torch.bfloat16,
    held=None,
):
    """A loop with a gradient scaler, under autocast."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth)
    model.train()
    losses = []
    for number, batch in enumerate(batches(STEPS * accumulate), start=1):
        with torch.autocast("cpu", dtype):
            loss = model(**batch).loss / accumulate
        scaler.scale(loss).backward()
        losses.append(loss.detach())
        if number % accumulate == 0:
            if clip is not None:
                if unscale:
                    scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(trained_by(model), clip)
            scaler.step(optimizer)
            scaler.update(held)
            optimizer.zero_grad()
    return losses


def trained(model, *, compute_loss=None, optimizers=(None, None), **arguments):
    """A run of transformers' Trainer."""
    rows = [{name: value[0] for name, value in batch.items()} for batch in batches(32)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        options = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, **arguments}
        settings = transformers.TrainingArguments(
            folder, max_steps=STEPS, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="steps", logging_steps=1, **options,
        )  # fmt: skip
        trainer = transformers.Trainer(model, settings, train_dataset=rows, optimizers=optimizers)
        if compute_loss is not None:
            vars(trainer)["compute_loss"] = compute_loss
        trainer.train()
        return [torch.tensor(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


class Experts(nn.Module):
    """Four copies of a layer, of which a router picks one for each token; never the last.

    ``dense``: each expert gets every token, and what it makes of those of others is multiplied by zero.
    """

    def __init__(self, layer, *, dense=False):
        super().__init__()
        self.router = nn.Linear(64, 3, bias=False)
        self.experts = nn.ModuleList(copy.deepcopy(layer) for _ in range(4))
        self.dense = dense

    def forward(self, hidden):
        picked = self.router(hidden.float()).argmax(-1, keepdim=True)
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            mine = (picked == number).to(hidden.dtype)
            if self.dense:
                out = out + expert(hidden) * mine
            elif mine.any():
                rows = mine.flatten().nonzero().flatten()
                out = out.flatten(0, 1).index_add(0, rows, expert(hidden.flatten(0, 1)[rows])).view_as(hidden)
        return out


def of_experts(between=lambda model: None, **options):
    base = load()
    torch.manual_seed(0)
    for block in base.model.layers:
        block.mlp = Experts(block.mlp, **options)
    base = prepare_model_for_kbit_training(base)
    model = get_peft_model(base, lora(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]))
    between(model)
    return model, each_step(model, adamw(model))


def llava():
    """A model with a vision tower, in four bits, prepared, with adapters on all layers."""
    text: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=255, image_seq_length=4,
    )  # fmt: skip
    torch.manual_seed(0)
    stored = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head"]
    )
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlavaForConditionalGeneration(config).bfloat16().save_pretrained(folder)
        base = transformers.LlavaForConditionalGeneration.from_pretrained(
            folder, quantization_config=stored, dtype=torch.bfloat16
        )
    # The last layer of the tower reaches no loss: LLaVA reads the one before it.
    names = r".*language_model.*_proj|.*vision.*layers\.0\..*(_proj|fc.)|.*projector\.linear_."
    model = get_peft_model(prepare_model_for_kbit_training(base), lora(target_modules=names))
    return model, adamw(model)


def t5(**adapters):
    """An encoder with a decoder, in four bits, prepared, with adapters."""
    config = transformers.T5Config(
        vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, pad_token_id=0
    )
    config.decoder_start_token_id = 0
    torch.manual_seed(0)
    stored = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        transformers.T5ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
        base = transformers.T5ForConditionalGeneration.from_pretrained(
            folder, quantization_config=stored, dtype=torch.bfloat16
        )
    fields = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"], **adapters}
    return get_peft_model(prepare_model_for_kbit_training(base), lora(**fields))


def with_pictures(model, optimizer):
    """The losses of steps on batches with a picture in each row."""
    model.train()
    losses = []
    for batch in batches(STEPS):
        batch["input_ids"].clamp_(max=254)[:, :4] = 255
        batch["labels"][:, :4] = -100
        pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        losses.append(plain_step(model, optimizer, {**batch, "pixel_values": pictures}))
    return losses


def with_batches(change, model=None):
    """A loop whose batches ``change`` changes in place."""
    model = model or prepared()
    optimizer, losses = adamw(model), []
    model.train()
    for batch in batches(STEPS):
        change(model, batch)
        losses.append(plain_step(model, optimizer, batch))
    return model, losses
