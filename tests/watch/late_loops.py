"""Loops that lose something behind the optimizer's back, or read what they should predict: each trains, and returns the model and its losses.

They call nothing of kbitcheck. ``SOUND`` has those in which nothing is wrong, ``BROKEN`` each other with the rule that must name it.
"""

import contextlib
import tempfile
from typing import Any

import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.nn.modules import Linear4bit
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
from peft import get_peft_model

from tests.watch.loops import STEPS, each_step, plain_step, scaled, t5, trained, with_batches
from tests.watch.own_loops import cross_entropy, of_logits, stepping
from tests.watch.runs import adamw, batches, lora, prepared, trained_by


def encoded_without_gradients(model):
    """A loop that runs the encoder by itself, and takes no gradients of it."""
    optimizer, losses = adamw(model), []
    model.train()
    for batch in batches(STEPS):
        with torch.no_grad():
            states = model.get_encoder()(input_ids=batch.pop("input_ids"), attention_mask=batch["attention_mask"])
        losses.append(plain_step(model, optimizer, {**batch, "encoder_outputs": states}))
    return model, losses


# ---- sound


def an_encoder_that_is_frozen():
    return encoded_without_gradients(t5(target_modules=r".*decoder.*\.(q|v)"))


def a_schedule_that_begins_anew():
    """At the end of each cycle the rate is zero for one step."""
    model = prepared()
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1.0, 0.0)[step % 2])
    return model, each_step(model, optimizer, between=lambda model, step: schedule.step())


def decoder_inputs_of_ones_own():
    def shift(model, batch):
        batch["decoder_input_ids"] = batch["labels"].roll(1, 1)

    return with_batches(shift, t5())


def layers_in_turn():
    """One of three layers trains in each step; its ``lora_A`` has no gradient then, as in any first step."""
    model = prepared(layers=3)
    optimizer, trained = adamw(model), {n: p for n, p in model.named_parameters() if p.requires_grad}

    def choose(model, step):
        for name, parameter in trained.items():
            parameter.requires_grad_(f".layers.{step % 3}." in name)

    choose(model, 0)
    return model, each_step(model, optimizer, between=lambda model, step: choose(model, step + 1))


def rows_of(length, **options):
    model = prepared(**options)
    optimizer = adamw(model)
    model.train()
    return model, [plain_step(model, optimizer, batch) for batch in batches(STEPS, length=length)]


def rows_of_two_tokens():
    """The only token with a label after it attends to itself alone: nothing teaches queries and keys."""
    return rows_of(2)


def rows_of_two_tokens_in_int8():
    return rows_of(2, scheme="int8", adapters=lora(lora_dropout=0.1))


def labels_of_the_second_token_alone():
    def ignore(model, batch):
        batch["labels"][:, 2:] = -100

    return with_batches(ignore)


def rows_of_one_token():
    def loss(model, batch):
        tokens = batch["input_ids"][:, :1]
        return cross_entropy(model(input_ids=tokens).logits.float(), (tokens + 1) % 256)

    return stepping(loss)


def a_gradient_that_is_really_tiny():
    """Of one pair of factors; Adam's epsilon is far larger, as it is meant to be."""
    model = prepared()
    trained_by(model)[0].data *= 1e-12
    return model, each_step(model, adamw(model))


def an_epsilon_that_a_rate_makes_up_for():
    model = prepared()
    return model, each_step(model, adamw(model, 1e2, eps=1e3, weight_decay=0.0))


def fused_and_with_a_larger_epsilon():
    model = prepared(adapters=lora(lora_dropout=0.1))
    return model, each_step(model, adamw(model, eps=1e-6, fused=True))


def averages_in_eight_bits():
    model = prepared(scheme="int8")
    return model, each_step(model, PagedAdamW8bit(trained_by(model), lr=1e-3))


SOUND = (
    a_gradient_that_is_really_tiny, an_epsilon_that_a_rate_makes_up_for, fused_and_with_a_larger_epsilon, averages_in_eight_bits,
    rows_of_two_tokens, rows_of_two_tokens_in_int8, labels_of_the_second_token_alone, rows_of_one_token,
    an_encoder_that_is_frozen, a_schedule_that_begins_anew, decoder_inputs_of_ones_own, layers_in_turn,
)  # fmt: skip


# ---- broken


def cast(model):
    for parameter in trained_by(model):
        parameter.data = parameter.data.bfloat16()


def cast_behind_the_optimizer():
    model = prepared()
    optimizer = adamw(model)
    cast(model)
    return model, each_step(model, optimizer)


def cast_in_mid_run():
    """As by an evaluation in half precision; AdamW's next step raises."""
    model = prepared()
    with contextlib.suppress(RuntimeError):
        return model, each_step(model, adamw(model), between=lambda model, step: cast(model))
    return model, []


def shifted_back():
    return of_logits(lambda logits, labels, tokens: cross_entropy(logits[:, 1:], tokens[:, :-1]))


def a_decoder_that_reads_its_labels():
    def pass_on(model, batch):
        batch["decoder_input_ids"] = batch["labels"].clone()

    return with_batches(pass_on, t5())


def an_encoder_run_without_gradients():
    return encoded_without_gradients(t5())


def a_schedule_of_one_step():
    model = prepared()
    optimizer = adamw(model)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 1)
    return model, each_step(model, optimizer, between=lambda model, step: schedule.step())


def an_encoder_and_decoder_in_eval_mode():
    """Whose cache then holds graphs, of both kinds of attention."""
    model = t5()
    optimizer = adamw(model)
    model.eval()
    return model, [plain_step(model, optimizer, batch) for batch in batches(STEPS)]


def factors_that_are_both_zero():
    model = prepared()
    for name, parameter in model.named_parameters():
        if "q_proj.lora_A" in name:
            parameter.data.zero_()
    return model, each_step(model, adamw(model))


def a_loss_times_zero():
    return stepping(lambda model, batch: model(**batch).loss * 0)


def an_epsilon_that_dwarfs_gradients():
    model = prepared()
    return model, each_step(model, adamw(model, eps=1e3))


def an_epsilon_that_dwarfs_gradients_in_eight_bits():
    model = prepared()
    return model, each_step(model, AdamW8bit(trained_by(model), lr=1e-3, eps=1e3))


def weights_that_decay_at_once_in_a_trainer():
    """Accelerate passes each step a closure that is None."""
    return (model := prepared()), trained(model, weight_decay=500.0)


BROKEN = {
    weights_that_decay_at_once_in_a_trainer: "KB711",
    an_epsilon_that_dwarfs_gradients: "KB712",
    an_epsilon_that_dwarfs_gradients_in_eight_bits: "KB712",
    a_loss_times_zero: "KB715",
    factors_that_are_both_zero: "KB715",
    cast_behind_the_optimizer: "KB313",
    shifted_back: "KB714",
    a_decoder_that_reads_its_labels: "KB721",
    an_encoder_run_without_gradients: "KB715",
    a_schedule_of_one_step: "KB712",
    an_encoder_and_decoder_in_eval_mode: "KB718",
}


def repacked_and_saved():
    """As an evaluation on a processor with AVX512-BF16 repacks weights, and a save lays them back, but for their scales."""

    def repack(model, step):
        for module in model.modules():
            if isinstance(module, Linear4bit):
                weight: Any = module.weight
                weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(
                    weight.data, weight.quant_state
                )
        model.state_dict()

    model = prepared()
    return model, each_step(model, adamw(model), between=repack)


# ---- a hook on the head, experts, and gates that rounding moves


def mixture():
    """With the fused experts that transformers 5 has, under autocast."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    stored = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(folder)
        base = transformers.MixtralForCausalLM.from_pretrained(folder, quantization_config=stored, dtype=torch.bfloat16)
    model = get_peft_model(base, lora(target_modules=["q_proj", "v_proj"]))
    return model, scaled(model, adamw(model))


def scaled_behind_the_head():
    model = prepared()
    model.get_submodule("base_model.model.lm_head").register_forward_hook(lambda module, args, output: output * 1.01)
    return model, each_step(model, adamw(model))


def relus_under_autocast():
    """As ``trl sft`` trains an OPT: layers that compute in float32 and adapters in bfloat16, under autocast."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=256, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    stored = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        transformers.OPTForCausalLM(config).bfloat16().save_pretrained(folder)
        base = transformers.OPTForCausalLM.from_pretrained(folder, quantization_config=stored, dtype=torch.float32)
    torch.manual_seed(2)
    model = get_peft_model(base, lora(r=8))
    cast(model)
    optimizer, losses = adamw(model), []
    model.train()
    for batch in batches(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, losses
