"""Training runs as users write them, in which nothing is wrong: each function trains, and returns the model and its losses.

They call nothing of kbitcheck.
"""

import functools

import peft
import torch
import transformers
from accelerate import Accelerator
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn

from tests.watch.loops import (
    STEPS,
    each_step,
    llava,
    of_experts,
    plain_step,
    scaled,
    t5,
    trained,
    with_batches,
    with_pictures,
)
from tests.watch.runs import adamw, batches, load, lora, prepared, trained_by


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


def radam_in_its_first_steps():
    model = prepared()
    return model, each_step(model, torch.optim.RAdam(trained_by(model), lr=1e-3), clip=1.0)


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


def trainer():
    model = prepared()
    return model, trained(model, gradient_accumulation_steps=4, warmup_steps=2)


def trainer_with_mixed_precision():
    model = prepared()
    return model, trained(model, bf16=True, gradient_checkpointing=True)


def int8_with_biases():
    """The layer behind attention gets half inputs, and keeps its bias in their dtype."""
    model = prepared(scheme="int8", attention_bias=True)
    return model, trained(model, bf16=True)


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
    # Not reentrant: what AdaLoRA adds to the loss for its factors reaches them in the same backward as the loss's own gradient.
    base = prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, adapters)
    for name, parameter in model.named_parameters():  # as PEFT 0.18 leaves the count of ranks
        parameter.requires_grad_(parameter.requires_grad and "ranknum" not in name)

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


def experts_without_tokens():
    return of_experts()


def experts_that_are_masked():
    return of_experts(dense=True)


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
    model = t5()
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


def tokens_dropped_from_inputs():
    """Labels keep what is replaced."""

    def drop(model, batch):
        batch["input_ids"][:, ::5] = 5

    return with_batches(drop)


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
    tokens_dropped_from_inputs,
    prompts_that_end_are_ignored,
    two_forwards_in_one_backward, adapters_in_turn, checkpointed_by_hand,
    warm_up_that_is_long, two_optimizers, an_optimizer_for_each_tensor, closures, adafactor, sgd_in_groups, sgd_in_small_steps, clipped,
    radam_in_its_first_steps,
    tied_head,
    evaluates_and_generates, prefix_tuning, prompt_tuning, ia3, head_and_embedding_saved, scaler, scaler_that_skips_the_first_steps,
    scaler_and_clipping, trainer, trainer_with_mixed_precision, int8_with_biases, accelerated, compiled, preferences, a_loss_of_ones_own,
    tokens_that_no_batch_has, one_cycle, ranks_that_change, norms_alone, experts_without_tokens, experts_that_are_masked, pictures,
    no_picture_in_the_first_batches, encoder_and_decoder, a_head_on_a_hidden_state, a_head_inside, an_adapter_that_knows_no_float64,
    thawed_one_after_another, two_models, the_gradient_of_a_point_nearby,
)  # fmt: skip
