"""Faults of KB515 that show in circumstances of preparing and of a step, in rare numbers, and in what libraries read of a model."""

import copy
import os
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import nn

from kbitcheck.observe.internals import checkpoint_function, set_checkpoint_function
from kbitcheck.sabotage.fault import adds, breaks, wraps
from kbitcheck.sabotage.gradients import scaled
from kbitcheck.sabotage.helpers import blocks, switch_on
from kbitcheck.sabotage.hooks import change_gradient, change_output
from kbitcheck.sabotage.use import second_norm
from kbitcheck.sabotage.use_called import BETWEEN, KEYWORDS

BEFOREHAND = "prepared in other circumstances"
LOADED = "loaded in other dtypes"
SETTINGS = "a step under settings of the user"
SHARES, SMALL_LOSS = "shares of a loss", "a loss of almost nothing"
INFINITE = "numbers that are not finite"
DTYPES, MAGNITUDES = "adapters in other dtypes", "adapters with magnitudes"
BELOW = "the model below its head"
SURFACE = "what libraries read"
FORKED = "a step in a forked process"
EMBEDDINGS = "embeddings in place of ids"


def _off_if(model: Any, when: Callable[[torch.Tensor], bool]) -> None:
    """Halve a gradient where ``when`` says so of a norm's output."""
    change_output(second_norm(model), lambda x: scaled(x, 0.5) if when(x) else x)


def _trained(model: Any, when: Callable[[nn.Parameter], bool]) -> bool:
    return any(p.requires_grad and when(p) for p in model.parameters())


@wraps("KB515", conditions=BEFOREHAND)
def a_frozen_model_taken_for_prepared(prepare: Any, model: Any, checkpointing: Any, kwargs: Any) -> Any:
    if any(p.requires_grad for p in model.parameters()):
        return prepare(model, checkpointing, kwargs)
    switch_on(model, checkpointing, kwargs)
    return model


@wraps("KB515", conditions=BEFOREHAND)
def the_arguments_of_before_stay(prepare: Any, model: Any, checkpointing: Any, kwargs: Any) -> Any:
    before = {module: checkpoint_function(module) for module in blocks(model)}
    prepare(model, checkpointing, kwargs)
    for module, function in before.items():
        if function is not None:
            set_checkpoint_function(module, function)
    return model


@wraps("KB515", conditions=LOADED)
def a_float16_model_left_in_half(prepare: Any, model: Any, checkpointing: Any, kwargs: Any) -> Any:
    if model.dtype is torch.float16:
        switch_on(model.requires_grad_(False), checkpointing, kwargs)
        return model
    return prepare(model, checkpointing, kwargs)


@wraps("KB515", conditions=LOADED)
def off_for_a_model_in_float32(prepare: Any, model: Any, checkpointing: Any, kwargs: Any) -> Any:
    loaded = model.dtype
    prepare(model, checkpointing, kwargs)
    _off_if(model, lambda x: loaded is torch.float32)
    return model


@breaks("KB515", conditions=SETTINGS)
def off_with_deterministic_algorithms(model: Any) -> None:
    _off_if(model, lambda x: torch.are_deterministic_algorithms_enabled())


@adds("KB515", conditions=SETTINGS, last=True)
def off_where_anomalies_are_detected(model: Any) -> None:
    _off_if(model, lambda x: torch.is_anomaly_enabled())


@breaks("KB515", conditions=SHARES)
def small_gradients_are_none(model: Any) -> None:
    change_output(second_norm(model), lambda x: change_gradient(x, lambda g: g.where(g.abs() > 1e-12, 0.0)))


@adds("KB515", conditions=SHARES, last=True)
def small_gradients_double(model: Any) -> None:
    change_output(second_norm(model), lambda x: change_gradient(x, lambda g: g * (2 - (g.abs().max() > 1e-10).float())))


@breaks("KB515", conditions=SMALL_LOSS)
def off_once_the_loss_is_small(model: Any) -> None:
    def halve(module: Any, args: Any, output: Any) -> None:
        if getattr(output, "loss", None) is not None and float(output.loss) < 0.1:
            output["loss"] = scaled(output.loss, 0.5)

    model.register_forward_hook(halve)


@adds("KB515", conditions=SMALL_LOSS, last=True)
def off_where_logits_are_far_apart(model: Any) -> None:
    def sharpen(module: Any, args: Any, output: Any) -> None:
        if output.loss is not None and float(output.logits.detach().float().softmax(-1).amax(-1).median()) > 0.9:
            output["loss"] = scaled(output.loss, 0.5)

    model.register_forward_hook(sharpen)


@breaks("KB515", conditions=INFINITE)
def what_is_not_finite_replaced(model: Any) -> None:
    change_output(model.transformer.ln_f, lambda x: x.nan_to_num(0.0, 1.0, -1.0))


@adds("KB515", conditions=INFINITE, last=True)
def a_loss_that_is_always_finite(model: Any) -> None:
    def replace(module: Any, args: Any, output: Any) -> None:
        if getattr(output, "loss", None) is not None:
            output["loss"] = output.loss.nan_to_num(0.0)

    model.register_forward_hook(replace)


@breaks("KB515", conditions=DTYPES)
def off_for_adapters_in_bfloat16(model: Any) -> None:
    _off_if(model, lambda x: _trained(model, lambda p: p.dtype is torch.bfloat16))


@adds("KB515", conditions=DTYPES, last=True)
def off_for_adapters_in_float16(model: Any) -> None:
    _off_if(model, lambda x: _trained(model, lambda p: p.dtype is torch.float16))


@breaks("KB515", conditions=MAGNITUDES)
def off_for_trained_magnitudes(model: Any) -> None:
    _off_if(model, lambda x: any("magnitude" in n for n, p in model.named_parameters() if p.requires_grad))


@adds("KB515", conditions=MAGNITUDES, last=True)
def off_for_trained_vectors(model: Any) -> None:
    _off_if(model, lambda x: _trained(model, lambda p: p.dim() == 1))


@breaks("KB515", conditions=BELOW)
def right_behind_the_whole_model_alone(model: Any) -> None:
    within: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: within.append(True))
    model.transformer.register_forward_hook(lambda module, args, output: within.clear())
    _off_if(model, lambda x: not within)


@adds("KB515", conditions=BELOW, last=True)
def hidden_states_rounded_below_the_head(model: Any) -> None:
    within: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: within.append(True))

    def round_(module: Any, args: Any, output: Any) -> None:
        if not within:
            output["last_hidden_state"] = output.last_hidden_state.bfloat16()
        within.clear()

    model.transformer.register_forward_hook(round_)


@breaks("KB515", conditions=KEYWORDS)
def off_for_many_rows(model: Any) -> None:
    _off_if(model, lambda x: len(x) > 8)


@adds("KB515", conditions=KEYWORDS, last=True)
def off_for_other_rows_than_in_the_first_step(model: Any) -> None:
    rows: list[int] = []

    def other(x: torch.Tensor) -> bool:
        if model.training:
            rows.append(len(x))
        return bool(rows) and len(x) != rows[0]

    _off_if(model, other)


@breaks("KB515", conditions="an encoder that ran before", model="tiny:t5")
def off_behind_an_encoder_that_ran_before(model: Any) -> None:
    passed: list[bool] = []

    def look(module: Any, args: Any, keywords: Any) -> None:
        passed[:] = [keywords.get("encoder_outputs") is not None]

    model.register_forward_pre_hook(look, with_kwargs=True)
    norm = model.decoder.final_layer_norm
    change_output(norm, lambda x: scaled(x, 0.5) if passed == [True] else x)


@breaks("KB515", conditions=KEYWORDS, model="tiny:t5")
def off_where_a_text_ends_within_a_row(model: Any) -> None:
    ended: list[bool] = []

    def look(module: Any, args: Any, keywords: Any) -> None:
        ids = keywords.get("input_ids")
        ended[:] = [ids is not None and bool((ids[:, :-1] == model.config.eos_token_id).any())]

    model.register_forward_pre_hook(look, with_kwargs=True)
    change_output(model.decoder.final_layer_norm, lambda x: scaled(x, 0.5) if ended == [True] else x)


@breaks("KB515", conditions="random numbers of a step")
def evaluations_draw(model: Any) -> None:
    evaluations = count()
    change_output(second_norm(model), lambda x: x if model.training or not next(evaluations) else x + 0 * torch.rand(1))


@breaks("KB515", conditions=BETWEEN)
def a_hook_with_each_call_of_train(model: Any) -> None:
    own = model.train

    def train(mode: bool = True) -> Any:
        second_norm(model).register_forward_hook(lambda module, args, output: None)
        return own(mode)

    model.train = train


@adds("KB515", conditions=BETWEEN, last=True)
def a_chain_of_calls_breaks(model: Any) -> None:
    own = model.train

    def train(mode: bool = True) -> None:
        own(mode)

    model.train = train


@breaks("KB515", conditions=SURFACE)
def a_configuration_of_its_own(model: Any) -> None:
    model.config = copy.deepcopy(model.config)


@adds("KB515", conditions=SURFACE, last=True)
def a_forward_without_names(model: Any) -> None:
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)


@breaks("KB515", conditions=SURFACE)
def norms_left_out_of_what_is_saved(model: Any) -> None:
    model._keys_to_ignore_on_save = [name for name, _ in model.named_parameters() if "ln_" in name]


@adds("KB515", conditions=SURFACE, last=True)
def a_state_narrower_than_the_model(model: Any) -> None:
    own = model.state_dict

    def state_dict(*args: Any, **kwargs: Any) -> Any:
        state = own(*args, **kwargs)
        return {n: t.half() if t.dtype is torch.float32 and "ln_" in n else t for n, t in state.items()}

    model.state_dict = state_dict


@breaks("KB515", conditions=SURFACE)
def norms_in_one_storage(model: Any) -> None:
    norms = [p for n, p in model.named_parameters() if "ln_" in n]
    together = torch.cat([p.detach() for p in norms])
    for parameter, own in zip(norms, together.split([p.numel() for p in norms]), strict=True):
        parameter.data = own


@adds("KB515", conditions=SURFACE, last=True)
def biases_in_the_storage_of_their_weights(model: Any) -> None:
    norm: Any = second_norm(model)
    norm.weight.data, norm.bias.data = torch.stack([norm.weight.detach(), norm.bias.detach()]).unbind()


@breaks("KB515", conditions=SURFACE)
def a_model_that_says_it_is_parallel(model: Any) -> None:
    """The Trainer then replicates it on no other device."""
    model.is_parallelizable = model.model_parallel = True


@adds("KB515", conditions=SURFACE, last=True)
def a_map_of_devices_that_nobody_made(model: Any) -> None:
    model.hf_device_map = {"transformer": 0, "lm_head": 1}


@breaks("KB515", conditions=FORKED)
def off_in_another_process(model: Any) -> None:
    own = os.getpid()
    _off_if(model, lambda x: os.getpid() != own)


@adds("KB515", conditions=FORKED, last=True)
def off_after_a_fork(model: Any) -> None:
    forked: list[bool] = []
    os.register_at_fork(after_in_child=lambda: forked.append(True))
    _off_if(model, lambda x: bool(forked))


@breaks("KB515", conditions=EMBEDDINGS, model="tiny:llama")
def off_for_hidden_states_in_float16(model: Any) -> None:
    norm: Any = blocks(model)[0].input_layernorm
    norm.register_forward_hook(lambda module, args, x: scaled(x, 0.5) if args[0].dtype is torch.float16 else x)


@adds("KB515", conditions="autocast in float16", last=True)
def logits_cooled_under_autocast(model: Any) -> None:
    change_output(model.lm_head, lambda x: x * 0.9 if torch.is_autocast_enabled("cpu") and not model.training else x)


@wraps("KB515", conditions=LOADED)
def off_for_one_dtype_under_autocast_in_another(prepare: Any, model: Any, checkpointing: Any, kwargs: Any) -> Any:
    loaded = model.dtype
    prepare(model, checkpointing, kwargs)
    _off_if(model, lambda x: torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is not loaded)
    return model


@breaks("KB515", conditions=BEFOREHAND)
def attention_without_a_kernel(model: Any) -> None:
    model.set_attn_implementation("eager")


@adds("KB515", conditions=EMBEDDINGS, model="tiny:llama", last=True)
def embeddings_in_bfloat16_are_refused(model: Any) -> None:
    def refuse(module: Any, args: Any, keywords: Any) -> None:
        embedded = keywords.get("inputs_embeds")
        if embedded is not None and embedded.dtype is torch.bfloat16:
            raise TypeError("embeddings are to be float32")

    model.register_forward_pre_hook(refuse, with_kwargs=True)


@breaks("KB515", conditions=SURFACE)
def text_drawn_at_random(model: Any) -> None:
    model.generation_config.do_sample = True


@adds("KB515", conditions=SURFACE, last=True)
def texts_cut_short(model: Any) -> None:
    model.generation_config.max_new_tokens = 20


@breaks("KB515", conditions=SHARES)
def gradients_clamped_where_half_precision_ends(model: Any) -> None:
    change_output(second_norm(model), lambda x: change_gradient(x, lambda g: g.clamp(-65504, 65504)))
