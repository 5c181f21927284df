"""Training runs as users write them, each with a fault: a function that trains, and returns the model and its losses.

They call nothing of kbitcheck. ``BROKEN`` has each with the rule that must name it.
"""

import contextlib
import warnings

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn

from tests.watch.loops import (
    STEPS,
    each_step,
    llava,
    of_experts,
    plain_step,
    scaled,
    trained,
    with_batches,
    with_pictures,
)
from tests.watch.runs import adamw, batches, load, lora, prepared, trained_by


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


def labels_of_other_rows():
    def mix(model, batch):
        batch["labels"] = batch["labels"].flip(0)

    return with_batches(mix)


def seeded_before_each_step():
    model = prepared(adapters=lora(lora_dropout=0.1))
    optimizer = adamw(model)
    model.train()
    losses = []
    for batch in batches(STEPS):
        torch.manual_seed(0)
        losses.append(plain_step(model, optimizer, batch))
    return model, losses


def outputs_kept_by_hooks():
    """As of a script that looks at activations, and forgets to let them go."""
    model, kept = prepared(), []
    for inner in model.base_model.model.model.layers[0].children():
        inner.register_forward_hook(lambda module, args, output: kept.append(output))
    return model, each_step(model, adamw(model))


def two_layers_share_a_factor():
    model = prepared()
    first, second = (m.lora_A for n, m in model.named_modules() if n.endswith("q_proj"))
    second["default"].weight = first["default"].weight
    return model, each_step(model, adamw(model))


BROKEN = {
    two_layers_share_a_factor: "KB102",
    outputs_kept_by_hooks: "KB722",
    padding_that_counts: "KB721",
    ends_that_never_count: "KB721",
    tokens_at_one_position: "KB721",
    labels_of_other_rows: "KB721",
    seeded_before_each_step: "KB721",
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
