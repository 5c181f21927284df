"""Loops that accumulate, pad, take turns or hook gradients, as users write them: each trains, and returns the model and its losses.

They call nothing of kbitcheck. ``SOUND`` has those in which nothing is wrong, ``BROKEN`` each other with the rule that must name it, ``NOTED``
those that may be meant so, each with the rule that says so in a note.
"""

import tempfile
import warnings

import torch
import transformers
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig

from tests.watch.loops import STEPS, each_step, plain_step, trained, with_batches
from tests.watch.own_loops import stepping
from tests.watch.runs import adamw, batches, load, lora, prepared, trained_by


def accumulated(divide, *, count=4, epochs=1, length=4 * STEPS, behind=lambda: None, loss_of=None):
    """Steps of ``count`` batches, and one of what is left over at the end of each epoch; ``behind`` runs after each backward."""
    model = prepared()
    optimizer, losses = adamw(model), []
    model.train()
    for _ in range(epochs):
        for number, batch in enumerate(batches(length), start=1):
            loss = (loss_of(model, batch) if loss_of else model(**batch).loss) / divide(number)
            loss.backward()
            losses.append(loss.detach())
            behind()
            if number % count == 0 or number == length:
                optimizer.step()
                optimizer.zero_grad()
    return model, losses


def logits_loss(model, batch):
    labels = batch.pop("labels")[:, 1:].flatten()
    return nn.functional.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1).float(), labels)


def padded_on_the_left(change):
    """The first row begins with nine padding tokens, whose labels are ignored."""

    def pad(model, batch):
        batch["input_ids"][0, :9] = model.config.pad_token_id
        batch["labels"][0, :9] = -100
        change(batch)

    return with_batches(pad)


def hooked(place, hook):
    """A loop in which ``hook`` is on the outputs of a module."""
    model = prepared()
    model.get_submodule(f"base_model.model.{place}").register_forward_hook(hook)
    return model, each_step(model, adamw(model))


def halve(module, args, output):
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient / 2)


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


# ---- sound


def an_epoch_that_ends_within_a_step():
    """Six batches, by four: the last two are divided as the others."""
    return accumulated(lambda number: 4, epochs=2, length=6)


def an_epoch_whose_last_step_is_divided_by_its_own_number():
    return accumulated(lambda number: 4 if number <= 4 else 3, epochs=2, length=7)


def trainer_whose_epochs_end_within_a_step():
    model = prepared()
    return model, trained(model, gradient_accumulation_steps=5)


def optimizers_in_turn():
    """One for each factor of LoRA; the gradients of both are cleared after each step."""
    model = prepared()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    both = [torch.optim.AdamW([p for n, p in named if factor in n], lr=1e-3) for factor in ("lora_B", "lora_A")]
    model.train()
    losses = []
    for number, batch in enumerate(batches(STEPS)):
        loss = model(**batch).loss
        loss.backward()
        both[number % 2].step()
        model.zero_grad()
        losses.append(loss.detach())
    return model, losses


def a_critic_of_hidden_states():
    """It learns from detached states, and then teaches the adapters."""
    model = prepared()
    torch.manual_seed(1)
    critic = nn.Linear(64, 1)
    own, others = adamw(model), torch.optim.AdamW(critic.parameters(), lr=1e-3)
    model.train()
    losses = []
    for batch in batches(STEPS):
        out = model(**batch, output_hidden_states=True)
        hidden = out.hidden_states[-1].float()
        nn.functional.softplus(critic(hidden.detach())).mean().backward()
        others.step()
        loss = out.loss + nn.functional.softplus(-critic(hidden)).mean() / 10
        loss.backward()
        own.step()
        own.zero_grad()
        others.zero_grad()
        losses.append(loss.detach())
    return model, losses


def lora_plus():
    model = prepared()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    factors = [{"params": [p for n, p in named if factor in n]} for factor in ("lora_A", "lora_B")]
    return model, each_step(model, torch.optim.AdamW([{**factors[0], "lr": 1e-4}, {**factors[1], "lr": 16e-4}]))


class Averaging(torch.optim.Optimizer):
    """Schedule-free: gradients are taken between a base point and its average, which ``eval`` puts in the place of the weights."""

    def __init__(self, params, lr=1e-3, share=0.9):
        super().__init__(params, {"lr": lr, "share": share, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            part, share = 1 / group["count"], group["share"]
            for p in group["params"]:
                base = self.state[p].setdefault("base", p.clone())
                way = p.grad.sign()
                p.lerp_(base, part).add_(way, alpha=group["lr"] * (share * (1 - part) - 1))
                base.sub_(way, alpha=group["lr"])

    @torch.no_grad()
    def swap(self, *, evaluates):
        for group in self.param_groups:
            weight = 1 - 1 / group["share"] if evaluates else 1 - group["share"]
            for p in group["params"]:
                p.lerp_(self.state[p].get("base", p), weight)


def schedule_free():
    model = prepared(scheme="int8")
    optimizer = Averaging(trained_by(model))

    def evaluate(model, step):
        optimizer.swap(evaluates=True)
        model.eval()
        with torch.no_grad():
            model(**next(batches(1)))
        model.train()
        optimizer.swap(evaluates=False)

    return model, each_step(model, optimizer, between=evaluate)


def packed_texts():
    """Two in a row, whose positions begin anew."""

    def pack(model, batch):
        del batch["attention_mask"]
        batch["position_ids"] = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1).clone()
        batch["labels"][:, (0, 10)] = -100

    return with_batches(pack)


def padding_on_the_left_that_is_masked():
    def mask(batch):
        batch["attention_mask"][0, :9] = 0
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    return padded_on_the_left(mask)


def padding_on_the_right_without_a_mask():
    def pad(model, batch):
        del batch["attention_mask"]
        batch["input_ids"][0, -9:] = model.config.pad_token_id
        batch["labels"][0, -9:] = -100

    return with_batches(pad)


def texts_that_begin_with_the_padding_token():
    """Which begins a text, too, as where a tokenizer has one token for both."""

    def begin(model, batch):
        batch["input_ids"][:, 0] = model.config.pad_token_id

    return with_batches(begin)


def evaluates_between_accumulated_batches():
    """With gradients on, and a schedule that is stepped behind it."""
    model = prepared(scheme="int8", adapters=lora(lora_dropout=0.05))
    optimizer, losses = adamw(model), []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    model.train()
    for number, batch in enumerate(batches(2 * STEPS), start=1):
        loss = model(**batch).loss / 2
        loss.backward()
        losses.append(loss.detach())
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        model(**batch).loss.item()
        model.train()
        if number % 2 == 0:
            schedule.step()
    return model, losses


def noise_on_embeddings():
    def noise(module, args, output):
        return output + torch.zeros_like(output).uniform_(-0.01, 0.01) if module.training else output

    return hooked("model.embed_tokens", noise)


def a_teacher():
    """What another quantized model says is learned, too."""
    teacher, model = load().eval(), prepared()

    def distilled(model, batch):
        out = model(**batch)
        del batch["labels"]
        with torch.no_grad():
            goal = teacher(**batch).logits.float().softmax(-1)
        return out.loss / 2 + nn.functional.kl_div(out.logits.float().log_softmax(-1), goal, reduction="batchmean") / 48

    return stepping(distilled, model)


def with_alibi(kind, *, between=lambda model: None, attention=False):
    """A model whose blocks also return their probabilities of attention, which they use themselves; under autocast, unprepared."""
    fields = {
        "bloom": {"n_layer": 2, "n_head": 4, "hidden_size": 64},
        "mpt": {"n_layers": 2, "n_heads": 4, "d_model": 64, "max_seq_len": 64},
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=256, pad_token_id=0, **fields[kind])
    plain = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        model = type(plain).from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)
    model = get_peft_model(model, lora())
    between(model)
    optimizer, losses = adamw(model), []
    model.train()
    for batch in batches(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**batch, output_attentions=attention)
            loss = out.loss + (sum(a.float().square().mean() for a in out.attentions) if attention else 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, losses


def blocks_that_return_their_attention():
    return with_alibi("bloom")


def blocks_that_return_their_attention_under_another_bias():
    return with_alibi("mpt")


def a_loss_of_attention():
    return with_alibi("bloom", attention=True)


SOUND = (
    an_epoch_that_ends_within_a_step, an_epoch_whose_last_step_is_divided_by_its_own_number, trainer_whose_epochs_end_within_a_step,
    optimizers_in_turn, a_critic_of_hidden_states, lora_plus, schedule_free, packed_texts, padding_on_the_left_that_is_masked,
    padding_on_the_right_without_a_mask, texts_that_begin_with_the_padding_token, evaluates_between_accumulated_batches,
    noise_on_embeddings, a_teacher, blocks_that_return_their_attention, blocks_that_return_their_attention_under_another_bias,
    a_loss_of_attention,
)  # fmt: skip


# ---- broken


def accumulated_losses_undivided():
    return accumulated(lambda number: 1)


def undivided_in_a_trainer():
    """It takes the number of tokens, so that the Trainer divides nothing, and does not use it."""

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss

    model = prepared()
    return model, trained(model, compute_loss=compute_loss, gradient_accumulation_steps=4)


def a_schedule_stepped_with_every_batch():
    model = prepared()
    optimizer, losses = adamw(model), []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, total_iters=16)
    model.train()
    for number, batch in enumerate(batches(4 * STEPS), start=1):
        loss = model(**batch).loss / 4
        loss.backward()
        losses.append(loss.detach())
        if number % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "`lr_scheduler.step()` before `optimizer.step()`"
            schedule.step()
    return model, losses


def padding_on_the_left_without_a_mask():
    return padded_on_the_left(lambda batch: batch.pop("attention_mask"))


def padding_on_the_left_that_no_mask_leaves_out():
    return padded_on_the_left(lambda batch: None)


def padding_on_the_left_of_a_loss_of_ones_own():
    def loss(model, batch):
        batch["input_ids"][0, :9] = model.config.pad_token_id
        del batch["attention_mask"]
        labels = batch.pop("labels")[:, 1:].clone()
        labels[0, :8] = -100
        return nn.functional.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1).float(), labels.flatten())

    return stepping(loss)


def halved_behind_the_last_block():
    return hooked("model.layers.1", halve)


def halved_between_blocks():
    return hooked("model.layers.0", halve)


def halved_behind_the_last_norm():
    return hooked("model.norm", halve)


def halved_before_the_head():
    """By what hands the states on as they are."""
    model = prepared()
    head = model.get_submodule("base_model.model.lm_head")
    head.register_forward_pre_hook(lambda module, args: (Halved.apply(args[0]),))
    return model, each_step(model, adamw(model))


def halved_by_a_backward_hook_of_the_norm():
    model = prepared()
    norm = model.get_submodule("base_model.model.model.norm")
    norm.register_full_backward_hook(lambda module, entering, leaving: (entering[0] / 2,))
    return model, each_step(model, adamw(model))


def half_of_the_blocks_checkpointed():
    model = prepared(layers=4)
    for block in model.get_submodule("base_model.model.model.layers")[::2]:
        block.gradient_checkpointing = False
    return model, each_step(model, adamw(model))


def a_hook_lost_after_a_save():
    """Of the embedding, which made inputs require grad; a copy of the head trains on."""
    how = {"use_reentrant": True}
    base = prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs=how)
    adapters = lora(modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, adapters)

    def save(model, step):
        if step == 0:
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
            model.get_input_embeddings()._forward_hooks.clear()

    return model, each_step(model, adamw(model), between=save)


def cast_to_float16_behind_the_optimizer():
    model = prepared()
    optimizer = adamw(model)
    for parameter in trained_by(model):
        parameter.data = parameter.data.half()
    return model, each_step(model, optimizer)


def replaced_by_copies_in_bfloat16():
    model = prepared()
    optimizer = adamw(model)
    for name, module in model.named_modules():
        if "lora_" in name and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().bfloat16())
    return model, each_step(model, optimizer)


def attention_that_gets_half_a_gradient():
    def halve(module, args, output):
        output.register_hook(lambda gradient: gradient / 2)

    def hooked(model):
        for name, module in model.named_modules():
            if name.endswith("attention_dropout"):
                module.register_forward_hook(halve)

    return with_alibi("bloom", between=hooked)


BROKEN = {
    accumulated_losses_undivided: "KB707",
    undivided_in_a_trainer: "KB707",
    a_schedule_stepped_with_every_batch: "KB727",
    attention_that_gets_half_a_gradient: "KB304",
    padding_on_the_left_without_a_mask: "KB721",
    padding_on_the_left_that_no_mask_leaves_out: "KB721",
    padding_on_the_left_of_a_loss_of_ones_own: "KB721",
    halved_behind_the_last_block: "KB304",
    halved_between_blocks: "KB304",
    halved_behind_the_last_norm: "KB304",
    halved_before_the_head: "KB304",
    halved_by_a_backward_hook_of_the_norm: "KB304",
    half_of_the_blocks_checkpointed: "KB401",
    a_hook_lost_after_a_save: "KB715",
    cast_to_float16_behind_the_optimizer: "KB211",
    replaced_by_copies_in_bfloat16: "KB710",
}


# ---- may be meant so


def two_losses_added():
    return accumulated(lambda number: 1, count=2)


def undivided_losses_of_ones_own():
    return accumulated(lambda number: 1, loss_of=logits_loss)


def two_optimizers_of_the_same_in_turn():
    model = prepared()
    both = adamw(model), adamw(model)
    model.train()
    return model, [plain_step(model, both[number % 2], batch) for number, batch in enumerate(batches(STEPS))]


NOTED = {
    two_losses_added: ("KB707", "the losses of 2 batches are added up in each step"),
    undivided_losses_of_ones_own: ("KB707", "are their losses divided by their number?"),
    two_optimizers_of_the_same_in_turn: ("KB710", "several optimizers, which step in turns, hold 28 tensors"),
}
