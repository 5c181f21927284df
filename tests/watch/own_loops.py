"""Loops with a loss, an optimizer or a schedule of their own, as users write them: each trains, and returns the model and its losses.

They call nothing of kbitcheck. ``SOUND`` has those in which nothing is wrong, ``BROKEN`` each other with the rule that must name it, ``NOTED``
those that may be meant so, each with the rule that says so in a note.
"""

import warnings

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn

from tests.watch.loops import STEPS, each_step, plain_step
from tests.watch.runs import adamw, batches, load, lora, prepared, trained_by


def stepping(loss_of, model=None, optimizer=None, *, retain=False, keep=lambda loss: None):
    """A loop whose loss is ``loss_of(model, batch)``."""
    model = model or prepared()
    optimizer = optimizer or adamw(model)
    model.train()
    losses = []
    for batch in batches(STEPS):
        loss = loss_of(model, batch)
        loss.backward(retain_graph=retain)
        optimizer.step()
        optimizer.zero_grad()
        keep(loss)
        losses.append(loss.detach())
    return model, losses


def of_logits(loss_of, *, passed=False, **options):
    """A loop whose loss is ``loss_of(logits, labels, tokens)``; the first half of each row is a prompt, whose labels are ignored."""

    def loss(model, batch):
        labels = batch["labels"] if passed else batch.pop("labels")
        labels[:, :12] = -100
        return loss_of(model(**batch).logits.float(), labels, batch["input_ids"])

    return stepping(loss, **options)


def cross_entropy(logits, labels, **options):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def shifted(logits, labels, tokens):
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def scheduled(rate, factor, *, step=lambda schedule: schedule.step()):
    model = prepared()
    optimizer = adamw(model, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return model, each_step(model, optimizer, between=lambda model, number: step(schedule))


def written_back(change):
    """After each step ``change(kept, parameter, number)`` changes each parameter, beside a first copy of it."""
    model = prepared()
    kept = [p.detach().clone() for p in trained_by(model)]

    def between(model, number):
        with torch.no_grad():
            for each, parameter in zip(kept, trained_by(model), strict=True):
                change(each, parameter, number)

    return model, each_step(model, adamw(model), between=between)


# ---- sound


def prompts_left_out():
    return of_logits(shifted)


def prompts_left_out_of_a_loss_beside_the_models():
    return of_logits(shifted, passed=True)


def large_logits_cost():
    """Every token has a part in it, also those whose labels are ignored."""
    return of_logits(lambda *args: shifted(*args) + 1e-3 * args[0].logsumexp(-1).square().mean(), passed=True)


def chosen_and_rejected():
    """The logits of the second row are pushed away from its tokens; tokens of a row are summed."""

    def preference(logits, labels, tokens):
        weights = (
            -nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
            .view(len(tokens), -1)
            .sum(1)
        )
        return -nn.functional.logsigmoid(weights[0] - weights[1])

    return of_logits(preference)


def a_row_without_labels():
    def loss(model, batch):
        batch["labels"][1] = -100
        return model(**batch).loss

    return stepping(loss)


def losses_are_kept():
    kept: list[torch.Tensor] = []
    return stepping(lambda model, batch: model(**batch).loss, keep=kept.append)


def a_schedule_of_rates():
    """The optimizer's rate is one, so that what a schedule returns is the rate; it warms up."""
    return scheduled(1.0, lambda step: 1e-3 * min((step + 1) / 1000, 1))


def a_warm_up_of_many_steps():
    return scheduled(1e-3, lambda step: step / 20_000)


def an_average_beside():
    return written_back(lambda kept, parameter, number: kept.lerp_(parameter, 0.01))


def an_average_swapped_in_for_evaluations():
    model = prepared(scheme="int8")
    average = [p.detach().clone() for p in trained_by(model)]

    def evaluate(model, number):
        with torch.no_grad():
            own = [p.detach().clone() for p in trained_by(model)]
            for mine, parameter in zip(average, trained_by(model), strict=True):
                parameter.copy_(mine.lerp_(parameter, 0.01))
            model.eval()
            model(**next(batches(1)))
            model.train()
            for mine, parameter in zip(own, trained_by(model), strict=True):
                parameter.copy_(mine)

    return model, each_step(model, adamw(model), between=evaluate)


def halfway_back_every_other_step():
    """As Lookahead does."""

    def back(kept, parameter, number):
        if number % 2:
            parameter.copy_(kept.lerp_(parameter, 0.5))

    return written_back(back)


def bounded():
    """One tensor is put back after each step."""
    model = prepared()
    first = trained_by(model)[0].detach().clone()

    def bound(model, number):
        with torch.no_grad():
            trained_by(model)[0].copy_(first)

    return model, each_step(model, adamw(model), between=bound)


def rates_by_layer():
    model = prepared()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if f".{layer}." in n], "lr": 1e-3 * 0.1**layer} for layer in range(2)]
    return model, each_step(model, torch.optim.AdamW(groups))


def adapters_of_rank_64_scaled_by_1():
    model = prepared(adapters=lora(r=64, lora_alpha=1))
    return model, each_step(model, adamw(model))


def a_cost_maximized():
    model = prepared()
    return stepping(lambda model, batch: -model(**batch).loss, model=model, optimizer=adamw(model, maximize=True))


def some_texts_unlearned():
    """Beside others that are learned."""

    def loss(model, batch):
        one, other = ({name: value[row : row + 1] for name, value in batch.items()} for row in range(2))
        return model(**one).loss - 0.5 * model(**other).loss

    return stepping(loss)


class ChangesGradients(torch.optim.Optimizer):
    """Steps along gradients that it multiplies in place."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad.sign_().mul_(-group["lr"]))


def gradients_changed_by_the_step():
    model = prepared()
    return model, each_step(model, ChangesGradients(trained_by(model), 1e-3))


def decays_much():
    """A hundredth in each step, and more that Adam divides by the gradient's size."""
    model = prepared()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    first, second = ([p for n, p in model.named_parameters() if n in names and kind in n] for kind in ("_A", "_B"))
    optimizers = (
        torch.optim.AdamW(first, lr=1e-3, weight_decay=10.0),
        torch.optim.Adam(second, 1e-3, weight_decay=500.0),
    )
    model.train()
    losses = []
    for batch in batches(STEPS):
        loss = model(**batch).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return model, losses


def two_scaled_losses_in_one_backward():
    model = prepared()
    optimizer, losses = adamw(model), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model.train()
    for one, other in zip(batches(STEPS), batches(STEPS, rows=1), strict=True):
        scaled = [scaler.scale(model(**batch).loss / 2) for batch in (one, other)]
        sum(scaled).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(sum(scaled).detach())
    return model, losses


SOUND = (
    prompts_left_out, prompts_left_out_of_a_loss_beside_the_models, large_logits_cost, chosen_and_rejected, a_row_without_labels,
    losses_are_kept, a_schedule_of_rates, a_warm_up_of_many_steps, an_average_beside, an_average_swapped_in_for_evaluations,
    halfway_back_every_other_step, bounded, rates_by_layer, adapters_of_rank_64_scaled_by_1, two_scaled_losses_in_one_backward,
    a_cost_maximized, some_texts_unlearned, gradients_changed_by_the_step, decays_much,
)  # fmt: skip


# ---- broken


def rows_detached_before_the_head():
    model = prepared()
    head = model.get_submodule("base_model.model.lm_head")
    head.register_forward_pre_hook(lambda module, args: (torch.cat([args[0][:1], args[0][1:].detach()]),))
    return model, each_step(model, adamw(model))


def tokens_detached_behind_the_blocks():
    model = prepared()
    norm = model.get_submodule("base_model.model.model.norm")
    norm.register_forward_hook(lambda module, args, out: torch.cat([out[:, :12].detach(), out[:, 12:]], 1))
    return model, each_step(model, adamw(model))


def ends_of_rows_detached_between_blocks():
    model = prepared(layers=3)
    block = model.get_submodule("base_model.model.model.layers")[1]
    block.register_forward_hook(lambda module, args, out: torch.cat([out[:, :12], out[:, 12:].detach()], 1))
    return model, each_step(model, adamw(model))


def rows_detached_behind_the_head():
    """The model's own loss is taken of what the hook returns."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            gradient[1:] = 0
            return gradient

    model = prepared()
    blocks = model.get_submodule("base_model.model.model.layers")
    blocks[1].register_forward_hook(lambda module, args, out: Half.apply(out))
    return model, each_step(model, adamw(model))


def not_shifted():
    return of_logits(lambda logits, labels, tokens: cross_entropy(logits, labels))


def prompts_that_count():
    return of_logits(lambda logits, labels, tokens: cross_entropy(logits[:, :-1], tokens[:, 1:]), passed=True)


def padding_that_counts_in_a_loss_of_ones_own():
    def loss(model, batch):
        tokens = batch["input_ids"]
        batch["attention_mask"][:, -6:] = 0
        del batch["labels"]
        return cross_entropy(model(**batch).logits[:, :-1].float(), tokens[:, 1:])

    return stepping(loss)


def an_optimizer_for_each_step():
    model = prepared()
    model.train()
    return model, [plain_step(model, adamw(model), batch) for batch in batches(STEPS)]


def state_thrown_away():
    model = prepared()
    optimizer = adamw(model)
    return model, each_step(model, optimizer, between=lambda model, step: optimizer.state.clear())


def a_schedule_that_returns_rates():
    return scheduled(1e-4, lambda step: 1e-4 * 0.9**step)


def a_schedule_that_returns_rates_and_warms_up():
    return scheduled(1e-4, lambda step: 1e-4 * min((step + 1) / 100, 1))


def an_average_written_back():
    def back(kept, parameter, number):
        parameter.copy_(kept.lerp_(parameter, 0.01))

    return written_back(back)


def old_weights_written_back():
    return written_back(lambda kept, parameter, number: parameter.copy_(kept))


def a_loss_negated():
    """And divided, as where batches are accumulated."""
    return stepping(lambda model, batch: -model(**batch).loss / 4)


def a_loss_maximized():
    model = prepared(adapters=lora(lora_dropout=0.1))
    return model, each_step(model, adamw(model, maximize=True, weight_decay=0.1), clip=1.0)


def a_loss_maximized_by_sgd():
    model = prepared()
    return model, each_step(model, torch.optim.SGD(trained_by(model), lr=1.0, maximize=True))


def weights_that_decay_at_once():
    model = prepared()
    return model, each_step(model, adamw(model, weight_decay=200.0))


def two_optimizers_of_the_same():
    model = prepared()
    optimizers = adamw(model), adamw(model)
    model.train()
    losses = []
    for batch in batches(STEPS):
        loss = model(**batch).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        optimizers[0].zero_grad()
        losses.append(loss.detach())
    return model, losses


def two_groups_of_the_same():
    model = prepared()
    optimizer = adamw(model)
    (group,) = optimizer.param_groups
    optimizer.param_groups.append({**group, "params": [*group["params"]]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, each_step(model, optimizer)


def adapters_scaled_to_nothing():
    model = prepared(adapters=lora(lora_alpha=4e-6))
    return model, each_step(model, adamw(model))


def one_of_two_losses_unscaled():
    model = prepared()
    optimizer, losses = adamw(model), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model.train()
    for number, batch in enumerate(batches(2 * STEPS), start=1):
        loss = model(**batch).loss / 2
        (scaler.scale(loss) if number % 2 else loss).backward()
        losses.append(loss.detach())
        if number % 2 == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return model, losses


def graphs_retained():
    kept: list[torch.Tensor] = []
    return stepping(lambda model, batch: model(**batch).loss, retain=True, keep=kept.append)


BROKEN = {
    rows_detached_before_the_head: "KB723",
    tokens_detached_behind_the_blocks: "KB723",
    ends_of_rows_detached_between_blocks: "KB723",
    rows_detached_behind_the_head: "KB723",
    not_shifted: "KB714",
    prompts_that_count: "KB721",
    padding_that_counts_in_a_loss_of_ones_own: "KB721",
    an_optimizer_for_each_step: "KB724",
    state_thrown_away: "KB724",
    a_schedule_that_returns_rates: "KB712",
    a_schedule_that_returns_rates_and_warms_up: "KB712",
    an_average_written_back: "KB711",
    old_weights_written_back: "KB711",
    a_loss_negated: "KB721",
    a_loss_maximized: "KB721",
    a_loss_maximized_by_sgd: "KB721",
    weights_that_decay_at_once: "KB711",
    two_optimizers_of_the_same: "KB710",
    two_groups_of_the_same: "KB710",
    adapters_scaled_to_nothing: "KB725",
    one_of_two_losses_unscaled: "KB717",
    graphs_retained: "KB726",
}


# ---- noted


def half_of_the_batch_without_gradients():
    def loss(model, batch):
        with torch.no_grad():
            other = model(**{name: value[1:] for name, value in batch.items()}).loss
        return (model(**{name: value[:1] for name, value in batch.items()}).loss + other) / 2

    return stepping(loss)


def rows_left_out_of_a_loss_of_ones_own():
    return of_logits(lambda logits, labels, tokens: shifted(logits[:1], labels[:1], tokens[:1]))


def summed():
    return of_logits(lambda logits, labels, tokens: cross_entropy(logits[:, :-1], labels[:, 1:], reduction="sum"))


def a_group_that_stands_nearly_still():
    model = prepared()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if f in n], "lr": r} for f, r in (("lora_A", 1e-3), ("lora_B", 1e-8))]
    return model, each_step(model, torch.optim.AdamW(groups))


def an_optimizer_of_a_second_part():
    model = prepared()
    optimizers = [adamw(model), adamw(model)]
    model.train()
    return model, [plain_step(model, optimizers[number > 0], batch) for number, batch in enumerate(batches(STEPS))]


def a_tied_embedding_with_adapters():
    adapters = lora(target_modules=["q_proj", "v_proj", "embed_tokens"])
    model = get_peft_model(prepare_model_for_kbit_training(load(tie_word_embeddings=True)), adapters)
    return model, each_step(model, adamw(model))


NOTED = {
    half_of_the_batch_without_gradients: ("KB723", "took no gradients"),
    rows_left_out_of_a_loss_of_ones_own: ("KB723", "1 of 2 rows have no gradient at the logits"),
    summed: ("KB707", "is the loss a sum over tokens?"),
    a_group_that_stands_nearly_still: ("KB712", "14 tensors have a learning rate of 1e-08, others of 0.001"),
    an_optimizer_of_a_second_part: ("KB724", "before step 2 the optimizer's state of 28 tensors was thrown away"),
    a_tied_embedding_with_adapters: ("KB719", "tie_word_embeddings=True"),
}
