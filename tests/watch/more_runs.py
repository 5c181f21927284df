"""More training runs as users write them, with loops of their own: each is a function that trains and returns model and losses.

They call nothing of kbitcheck. ``SOUND`` has those in which nothing is wrong, ``BROKEN`` each other with the rule that must name it.
"""

import contextlib
import copy
import functools
import tempfile
import warnings
from typing import Any

import peft
import torch
import transformers
from accelerate import Accelerator
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


# ---- sound


def warm_up_that_is_long():
    model = prepared()
    optimizer = adamw(model)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 50, 100)
    return model, each_step(model, optimizer, between=lambda model, step: schedule.step())


def two_optimizers():
    """One for each factor of LoRA."""
    model = prepared()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    both = [torch.optim.AdamW([p for n, p in named if factor in n], lr=1e-3) for factor in ("lora_A", "lora_B")]
    model.train()
    losses = []
    for batch in batches(STEPS):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    return model, losses


def an_optimizer_for_each_tensor():
    """Each steps in the backward, as its tensor's gradient is there."""
    model = prepared()
    optimizers = {p: torch.optim.AdamW([p], lr=1e-3) for p in trained_by(model)}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    model.train()
    losses = []
    for batch in batches(STEPS):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    return model, losses


def closures():
    """LBFGS runs the model several times in a step."""
    model = prepared(adapters=lora(target_modules=["q_proj"]))
    optimizer = torch.optim.LBFGS(trained_by(model), lr=0.1, max_iter=3)
    model.train()
    losses = []
    for batch in batches(STEPS):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).detach())
    return model, losses


def adafactor():
    model = prepared()
    optimizer = transformers.Adafactor(trained_by(model), lr=1e-3, relative_step=False, scale_parameter=False)
    return model, each_step(model, optimizer)


def sgd_in_groups():
    model = prepared()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if f in n], "lr": r} for f, r in (("lora_A", 1e-2), ("lora_B", 1e-1))]
    return model, each_step(model, torch.optim.SGD(groups, momentum=0.9))


def sgd_in_small_steps():
    """The gradient of ``lora_A`` is as small as ``lora_B``, which starts at zero."""
    model = prepared()
    return model, each_step(model, torch.optim.SGD(trained_by(model), lr=1e-4), clip=0.3)


def clipped():
    model = prepared()
    return model, each_step(model, adamw(model), clip=1.0)


def tied_head():
    model = prepared(tie_word_embeddings=True)
    return model, each_step(model, adamw(model))


def evaluates_and_generates():
    """In int8: on some processors a forward in eval mode repacks 4-bit weights, which is a fault that KB104 names."""

    def evaluate(model, step):
        model.eval()
        with torch.no_grad():
            batch = next(batches(1))
            model(**batch)
            model.generate(input_ids=batch["input_ids"][:1, :4], max_new_tokens=3, do_sample=False)
        model.train()

    model = prepared(scheme="int8")
    return model, each_step(model, adamw(model), between=evaluate)


def prefix_tuning():
    base = prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False)
    model = get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    return model, each_step(model, adamw(model))


def prompt_tuning():
    base = prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False)
    model = get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    return model, each_step(model, adamw(model))


def ia3():
    adapters = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    model = prepared(adapters=adapters)
    return model, each_step(model, adamw(model))


def head_and_embedding_saved():
    model = prepared(adapters=lora(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "embed_tokens"]))
    return model, each_step(model, adamw(model))


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


def scaler():
    model = prepared()
    return model, scaled(model, adamw(model), accumulate=2)


def scaler_that_skips_the_first_steps():
    model = prepared()
    return model, scaled(model, adamw(model), scale=2.0**126)


def scaler_whose_scale_still_falls():
    """In float16 the first gradients overflow, until the scale has come down."""
    model = prepared(compute=torch.float16)
    return model, scaled(model, adamw(model), scale=2.0**24, dtype=torch.float16)


def scaler_and_clipping():
    model = prepared()
    return model, scaled(model, adamw(model), clip=0.1)


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


def trainer():
    model = prepared()
    return model, trained(model, gradient_accumulation_steps=4, warmup_steps=2)


def trainer_with_mixed_precision():
    model = prepared()
    return model, trained(model, bf16=True, gradient_checkpointing=True)


def accelerated():
    """Accelerate's own loop: it wraps the optimizer, accumulates and clips."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = prepared()
    model, optimizer = accelerator.prepare(model, adamw(model))
    model.train()
    losses = []
    for batch in batches(2 * STEPS):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return model, losses


def compiled():
    model = prepared()
    optimizer = adamw(model)
    model.train()
    around = torch.compile(model, backend="eager")
    return model, [plain_step(around, optimizer, batch) for batch in batches(STEPS)]


def preferences():
    """Two forwards for one backward, and two of the reference, without adapters and gradients."""
    model = prepared()
    optimizer = adamw(model)
    model.train()
    losses, several = [], list(batches(2 * STEPS))
    for one, other in zip(several[::2], several[1::2], strict=True):
        with torch.no_grad(), model.disable_adapter():
            reference = model(**one).loss - model(**other).loss
        loss = -torch.nn.functional.logsigmoid(model(**other).loss - model(**one).loss + reference)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, losses


def a_loss_of_ones_own():
    model = prepared()
    optimizer = adamw(model)
    model.train()
    losses = []
    for batch in batches(STEPS):
        labels = batch.pop("labels")[:, 1:].flatten()
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, losses


def tokens_that_no_batch_has():
    model = prepared(adapters=lora(trainable_token_indices={"embed_tokens": [0]}))
    return model, each_step(model, adamw(model))


def one_cycle():
    model = prepared()
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=20)
    return model, each_step(model, optimizer, between=lambda model, step: schedule.step())


def ranks_that_change():
    adapters = peft.AdaLoraConfig(
        target_modules=["q_proj", "v_proj"], total_step=20, init_r=4, target_r=2, tinit=1, tfinal=5, task_type="CAUSAL_LM"
    )  # fmt: skip
    model = prepared(adapters=adapters)

    def allocate(model, step):
        for parameter in trained_by(model):  # it reads gradients, which are gone by now
            parameter.grad = torch.zeros_like(parameter)
        model.base_model.update_and_allocate(step + 1)
        model.zero_grad()

    return model, each_step(model, adamw(model), between=allocate)


def norms_alone():
    """No adapter: the norms train, as the optimizer says."""
    model = prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model, each_step(model, adamw(model))


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


def experts_without_tokens():
    return of_experts()


def experts_that_are_masked():
    return of_experts(dense=True)


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


def pictures():
    model, optimizer = llava()
    return model, with_pictures(model, optimizer)


def no_picture_in_the_first_batches():
    model, optimizer = llava()
    model.train()
    losses = []
    for batch in batches(STEPS):
        batch["input_ids"].clamp_(max=254)
        losses.append(plain_step(model, optimizer, batch))
    return model, losses


def encoder_and_decoder():
    """Every block of the decoder reads the encoder's states."""
    config = transformers.T5Config(
        vocab_size=256,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
    )
    config.decoder_start_token_id = 0
    torch.manual_seed(0)
    stored = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        transformers.T5ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
        base = transformers.T5ForConditionalGeneration.from_pretrained(
            folder, quantization_config=stored, dtype=torch.bfloat16
        )
    adapters = lora(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    model = get_peft_model(prepare_model_for_kbit_training(base), adapters)
    return model, each_step(model, adamw(model))


def a_head_on_a_hidden_state():
    """Of a block in the middle, which the next block reads, too; its gradient is there before that of the model."""
    model = prepared(layers=3)
    head = nn.Linear(64, 1)
    optimizer = torch.optim.AdamW([*trained_by(model), *head.parameters()], lr=1e-3)
    model.train()
    losses = []
    for batch in batches(STEPS):
        output = model(**batch, output_hidden_states=True)
        loss = output.loss + head(output.hidden_states[1].float()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, losses


def a_head_inside():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.v_head = prepared(), nn.Linear(64, 1)

        def forward(self, **batch):
            output = self.model(**batch, output_hidden_states=True)
            return output.loss, self.v_head(output.hidden_states[-1].float())

    model = Model()
    optimizer = adamw(model)
    model.train()
    losses = []
    for batch in batches(STEPS):
        loss, value = model(**batch)
        (loss + value.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, losses


def an_adapter_that_knows_no_float64():
    model = prepared(adapters=peft.FourierFTConfig(n_frequency=16, target_modules=["q_proj"]))
    return model, each_step(model, adamw(model))


def thawed_one_after_another():
    model = prepared()
    late = [p for n, p in model.named_parameters() if "lora_" in n and ".layers.0." in n]
    for parameter in late:
        parameter.requires_grad_(False)
    optimizer = adamw(model)

    def thaw(model, step):
        if step == 0:
            for parameter in late:
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": late})

    return model, each_step(model, optimizer, between=thaw)


def two_models():
    model, other = prepared(), prepared()
    optimizers = adamw(model), adamw(other)
    model.train(), other.train()
    losses = []
    for batch in batches(STEPS):
        losses.append(plain_step(model, optimizers[0], batch))
        plain_step(other, optimizers[1], batch)
    return model, losses


def the_gradient_of_a_point_nearby():
    """Sharpness-aware: a first gradient says where the second, which the optimizer uses, is taken."""
    model = prepared()
    optimizer = adamw(model)
    model.train()
    losses = []
    for batch in batches(STEPS):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        ways = [(p, 0.01 * p.grad) for p in trained_by(model)]
        with torch.no_grad():
            for parameter, way in ways:
                parameter.add_(way)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        with torch.no_grad():
            for parameter, way in ways:
                parameter.sub_(way)
        optimizer.step()
        optimizer.zero_grad()
    return model, losses


def two_forwards_in_one_backward():
    """As where what was chosen and what was rejected are compared."""
    model = prepared()
    optimizer, losses = adamw(model), []
    model.train()
    for one, other in zip(batches(STEPS), batches(STEPS, rows=1), strict=True):
        loss = model(**one).loss + model(**other).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, losses


def adapters_in_turn():
    """Two tasks, an optimizer for each; the adapter of the other rests."""
    model = prepared()
    model.add_adapter("other", lora())
    optimizers = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        optimizers[name] = adamw(model)
    model.train()
    losses = []
    for name, batch in zip(2 * ("default", "other"), batches(STEPS), strict=True):
        model.set_adapter(name)
        losses.append(plain_step(model, optimizers[name], batch))
    return model, losses


def checkpointed_by_hand():
    """Where preparation was told to leave checkpointing off."""
    model = get_peft_model(prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False), lora())
    for layer in model.base_model.model.model.layers[::2]:
        forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
        layer.forward = forward
    model.config.use_cache = False
    return model, each_step(model, adamw(model))


def prompts_that_end_are_ignored():
    """Of a chat: the end of what the user says does not count, that of the answer does; padding is ignored."""

    def say(model, batch):
        batch["input_ids"][:, (8, -6)] = model.config.eos_token_id
        batch["attention_mask"][:, -5:] = 0
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :9] = -100
        batch["labels"][:, -5:] = -100

    return with_batches(say)


SOUND = (
    prompts_that_end_are_ignored,
    two_forwards_in_one_backward, adapters_in_turn, checkpointed_by_hand,
    warm_up_that_is_long, two_optimizers, an_optimizer_for_each_tensor, closures, adafactor, sgd_in_groups, sgd_in_small_steps, clipped,
    tied_head,
    evaluates_and_generates, prefix_tuning, prompt_tuning, ia3, head_and_embedding_saved, scaler, scaler_that_skips_the_first_steps,
    scaler_and_clipping, trainer, trainer_with_mixed_precision, accelerated, compiled, preferences, a_loss_of_ones_own,
    tokens_that_no_batch_has, one_cycle, ranks_that_change, norms_alone, experts_without_tokens, experts_that_are_masked, pictures,
    no_picture_in_the_first_batches, encoder_and_decoder, a_head_on_a_hidden_state, a_head_inside, an_adapter_that_knows_no_float64,
    thawed_one_after_another, two_models, the_gradient_of_a_point_nearby,
)  # fmt: skip


# ---- broken


def prepared_a_second_time():
    """Which freezes the adapters; the input's hook keeps the loss alive."""
    model = prepared()
    optimizer = adamw(model)
    model = prepare_model_for_kbit_training(model)
    return model, each_step(model, optimizer)


def checkpointing_switched_on_again_in_mid_run():
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    model = get_peft_model(prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs=kwargs), lora())

    def switch(model, step):
        if step == 0:
            model.gradient_checkpointing_enable()

    return model, each_step(model, adamw(model), between=switch)


def the_original_head_trains():
    model = prepared(adapters=lora(modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"]))
    head = model.get_submodule("base_model.model.lm_head")
    held = [p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n]
    head.original_module.weight.requires_grad_(True)
    return model, each_step(model, torch.optim.AdamW([*held, head.original_module.weight], lr=1e-3))


def divided_twice_in_the_trainer():
    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs, num_items_in_batch=num_items_in_batch).loss / 4

    model = prepared()
    return model, trained(model, compute_loss=compute_loss, gradient_accumulation_steps=4)


def scaler_that_skips_all():
    model = prepared()

    def poison(gradient):
        return gradient * float("inf")

    trained_by(model)[0].register_hook(poison)
    return model, scaled(model, adamw(model))


def scaler_that_is_held_at_its_scale():
    model = prepared(compute=torch.float16)
    return model, scaled(model, adamw(model), scale=2.0**24, dtype=torch.float16, held=2.0**24)


def clipped_before_unscaled():
    model = prepared()
    return model, scaled(model, adamw(model), clip=0.1, unscale=False)


def fp16_adapters_under_a_scaler():
    model = prepared()
    for parameter in trained_by(model):
        parameter.data = parameter.data.half()
    with contextlib.suppress(ValueError):  # "Attempting to unscale FP16 gradients."
        return model, scaled(model, adamw(model))
    return model, []


def gradients_never_cleared():
    model = prepared()
    optimizer = adamw(model)
    model.train()
    losses = []
    for batch in batches(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return model, losses


def merged_and_unloaded_in_mid_run():
    def merge(model, step):
        if step == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.merge_and_unload()

    model = prepared()
    return model, each_step(model, adamw(model), between=merge)


def clipped_to_zero():
    model = prepared()
    return model, each_step(model, adamw(model), clip=0.0)


def gradients_cleared_before_the_step():
    model = prepared()
    optimizer = adamw(model)
    model.train()
    losses = []
    for batch in batches(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.zero_grad()
        optimizer.step()
        losses.append(loss.detach())
    return model, losses


def merged_in_mid_run():
    def merge(model, step):
        if step == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.merge_adapter()

    model = prepared()
    return model, each_step(model, adamw(model), between=merge)


def merged_and_unmerged_in_mid_run():
    """As before an evaluation; what is requantized is not what it was."""

    def merge(model, step):
        if step == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.merge_adapter()
                model.unmerge_adapter()

    model = prepared()
    return model, each_step(model, adamw(model), between=merge)


def magnitudes_left_out():
    model = prepared(adapters=lora(use_dora=True))
    held = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    return model, each_step(model, torch.optim.AdamW(held, lr=1e-3))


def magnitudes_in_bfloat16():
    model = prepared(adapters=lora(use_dora=True))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data = parameter.data.bfloat16()
    return model, each_step(model, adamw(model, 1e-4))


def one_kind_of_norm_cast():
    model = prepared()
    for name, module in model.named_modules():
        if name.endswith("post_attention_layernorm"):
            module.weight.data = module.weight.data.bfloat16()
    return model, each_step(model, adamw(model))


def in_eval_mode():
    """Nothing is dropped, and nothing is recomputed."""
    model = prepared(adapters=lora(lora_dropout=0.1))
    optimizer = adamw(model)
    model.eval()
    return model, [plain_step(model, optimizer, batch) for batch in batches(STEPS)]


def adapters_switched_off():
    model = prepared()
    optimizer = adamw(model)
    model.train()
    with model.disable_adapter():
        return model, [plain_step(model, optimizer, batch) for batch in batches(STEPS)]


def inputs_do_not_require_grad():
    """Reentrant checkpointing then records no block; the head's copy keeps the loss alive."""
    base = load()
    for parameter in base.parameters():
        parameter.requires_grad = False
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    base.disable_input_require_grads() if hasattr(base, "_require_grads_hook") else None
    model = get_peft_model(base, lora(modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"]))
    for module in model.modules():
        module._forward_hooks.clear()
    return model, each_step(model, adamw(model))


def a_twentieth_in_every_block():
    """Each block's output is five per cent too large."""
    model = prepared()
    for block in model.base_model.model.model.layers:
        block.mlp.register_forward_hook(lambda module, args, output: output * 1.05)
    return model, each_step(model, adamw(model))


def grows(module, args, output):
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * 1.01)


def a_hundredth_of_a_gradient_in_every_block():
    model = prepared()
    for block in model.base_model.model.model.layers:
        block.mlp.register_forward_hook(grows)
    return model, each_step(model, adamw(model))


def half_of_the_labels_rows_ignored():
    """A row in the batch whose labels are all ignored is no fault, a batch of nothing else is."""
    model = prepared()
    optimizer = adamw(model)
    model.train()
    losses = []
    for number, batch in enumerate(batches(STEPS)):
        if number == 1:
            batch["labels"][:] = -100
        losses.append(plain_step(model, optimizer, batch))
    return model, losses


def an_expert_whose_output_is_cut():
    def cut(model):
        for block in model.base_model.model.model.layers:
            block.mlp.experts[1].register_forward_hook(lambda module, args, output: output.detach())

    return of_experts(cut)


def a_tower_whose_output_is_cut():
    model, optimizer = llava()
    projector = model.get_submodule("base_model.model.model.multi_modal_projector")
    projector.register_forward_hook(lambda module, args, output: output.detach())
    return model, with_pictures(model, optimizer)


def gradients_cleared_between_batches():
    model = prepared()
    optimizer = adamw(model)
    model.train()
    losses = []
    for number, batch in enumerate(batches(4 * STEPS), start=1):
        optimizer.zero_grad()
        loss = model(**batch).loss / 4
        loss.backward()
        losses.append(loss.detach())
        if number % 4 == 0:
            optimizer.step()
    return model, losses


def left_in_eval_mode():
    """By an evaluation after the first step."""
    model = prepared()
    return model, each_step(model, adamw(model), between=lambda model, step: model.eval())


def labels_shifted_twice():
    def shift(model, batch):
        batch["labels"] = nn.functional.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)

    return with_batches(shift)


def a_second_model_is_frozen():
    """After a step of a first model, to try it out."""
    first = prepared()
    plain_step(first.train(), adamw(first), next(batches(1)))
    del first
    model = prepare_model_for_kbit_training(prepared())
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model, each_step(model, adamw(model))


def with_batches(change):
    """A loop whose batches ``change`` changes in place."""
    model = prepared()
    optimizer, losses = adamw(model), []
    model.train()
    for batch in batches(STEPS):
        change(model, batch)
        losses.append(plain_step(model, optimizer, batch))
    return model, losses


def padding_that_counts():
    def pad(model, batch):
        batch["attention_mask"][0, -6:] = 0

    return with_batches(pad)


def ends_that_never_count():
    """As where labels of the padding token are ignored, which is the end of a text, too."""

    def end(model, batch):
        batch["input_ids"][batch["input_ids"] == model.config.eos_token_id] += 1
        batch["input_ids"][:, -1] = model.config.eos_token_id
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, -1] = -100

    return with_batches(end)


def tokens_at_one_position():
    def place(model, batch):
        batch["position_ids"] = torch.zeros_like(batch["input_ids"])

    return with_batches(place)


def outputs_kept_by_hooks():
    """As of a script that looks at activations, and forgets to let them go."""
    model, kept = prepared(), []
    for inner in model.base_model.model.model.layers[0].children():
        inner.register_forward_hook(lambda module, args, output: kept.append(output))
    return model, each_step(model, adamw(model))


BROKEN = {
    outputs_kept_by_hooks: "KB722",
    padding_that_counts: "KB721",
    ends_that_never_count: "KB721",
    tokens_at_one_position: "KB721",
    a_second_model_is_frozen: "KB710",
    prepared_a_second_time: "KB710",
    checkpointing_switched_on_again_in_mid_run: "KB703",
    the_original_head_trains: "KB710",
    divided_twice_in_the_trainer: "KB707",
    scaler_that_skips_all: "KB717",
    scaler_that_is_held_at_its_scale: "KB717",
    clipped_before_unscaled: "KB717",
    fp16_adapters_under_a_scaler: "KB717",
    clipped_to_zero: "KB715",
    gradients_never_cleared: "KB720",
    merged_and_unloaded_in_mid_run: "KB104",
    gradients_cleared_before_the_step: "KB715",
    merged_in_mid_run: "KB104",
    merged_and_unmerged_in_mid_run: "KB104",
    magnitudes_left_out: "KB710",
    magnitudes_in_bfloat16: "KB711",
    one_kind_of_norm_cast: "KB215",
    in_eval_mode: "KB718",
    adapters_switched_off: "KB710",
    inputs_do_not_require_grad: "KB715",
    a_twentieth_in_every_block: "KB304",
    a_hundredth_of_a_gradient_in_every_block: "KB304",
    half_of_the_labels_rows_ignored: "KB714",
    labels_shifted_twice: "KB714",
    an_expert_whose_output_is_cut: "KB715",
    gradients_cleared_between_batches: "KB707",
    left_in_eval_mode: "KB718",
    a_tower_whose_output_is_cut: "KB715",
}
