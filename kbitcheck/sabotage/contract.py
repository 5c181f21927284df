"""Faults of KB214 and KB5xx."""

import copy
import logging
import random
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from kbitcheck_reference import prepare_model_for_kbit_training
from torch import nn

from kbitcheck.sabotage.fault import Prepare, adds, breaks, implements, spoils, wraps
from kbitcheck.sabotage.helpers import before_enabling, blocks, enable, prepare_well, subclass
from kbitcheck.sabotage.hooks import hoard


@breaks("KB214")
def a_mark_taken_off(model: Any) -> None:
    del model.quantization_method


@wraps("KB214", alone=True)
def says_that_nothing_is_quantized(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    model = prepare(model, *arguments)
    model.is_quantized = False
    return model


@wraps("KB501", own_signature=True)
def older_signature(model: Any, use_gradient_checkpointing: bool = True) -> Any:
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing)


def _without_the_models_name(
    base: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing, gradient_checkpointing_kwargs)


@wraps("KB501", own_signature=True)
def takes_the_model_by_position_alone(*arguments: Any, **keywords: Any) -> Any:
    return _without_the_models_name(*arguments, **keywords)


@breaks("KB501")
def a_model_that_cannot_be_left_off(model: Any) -> None:
    for block in blocks(model):
        block.gradient_checkpointing = True


@wraps("KB502")
def a_copy_returned(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    return prepare(copy.deepcopy(model), *arguments)


@wraps("KB502")
def nothing_returned(prepare: Prepare, model: Any, *arguments: Any) -> None:
    prepare(model, *arguments)


@wraps("KB502", alone=True)
def a_copy_returned_when_checkpointing_is_off(prepare: Prepare, model: Any, checkpointing: bool, kwargs: Any) -> Any:
    return prepare(model if checkpointing else copy.deepcopy(model), checkpointing, kwargs)


@breaks("KB502", alone=True)
def a_class_swapped(model: Any) -> None:
    subclass(model)


@wraps("KB503")
def kwargs_filled_in_place(prepare: Prepare, model: Any, checkpointing: bool, kwargs: Any) -> Any:
    if kwargs is not None:
        kwargs.setdefault("preserve_rng_state", True)
    return prepare(model, checkpointing, kwargs)


def _passing_the_dictionary_on(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None
) -> Any:
    """Gives the model the caller's dictionary, as many implementations do; the reference gives it a copy."""
    prepare_model_for_kbit_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    if use_gradient_checkpointing:
        enable(model, gradient_checkpointing_kwargs)
    return model


@spoils("KB503", prepare=_passing_the_dictionary_on)
def a_model_that_fills_in_its_arguments(model: Any) -> None:
    before_enabling(model, lambda self, kwargs: kwargs.setdefault("preserve_rng_state", True) if kwargs else None)


@breaks("KB504")
def hooks_that_pile_up(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: None)


@adds("KB504", last=True)
def hooks_again_with_every_call(model: Any) -> None:
    model.enable_input_require_grads()


def _require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


@breaks("KB505")
def a_hook_that_nobody_can_remove(model: Any) -> None:
    model.get_input_embeddings().register_forward_hook(_require_grad)


@implements("KB505")
def hooks_beside_what_the_model_hooks(model: Any, checkpointing: bool, kwargs: Any) -> None:
    prepare_well(model, checkpointing, kwargs)
    if checkpointing:
        model.get_input_embeddings().register_forward_hook(_require_grad)


@wraps("KB506")
def frozen_before_it_is_checked(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    model.requires_grad_(False)
    return prepare(model, *arguments)


@spoils("KB506")
def a_model_that_refuses_half_way(model: Any) -> None:
    """The model says that it supports checkpointing, and raises when the first block is enabled."""

    def switch(self: Any, enable: bool = True, **how: Any) -> None:
        blocks(self)[0].gradient_checkpointing = enable
        raise ValueError(f"{type(self).__name__} cannot checkpoint; pass use_gradient_checkpointing=False")

    subclass(model, _set_gradient_checkpointing=switch)
    model.supports_gradient_checkpointing = True


@wraps("KB507")
def seed_set(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    random.seed(0)
    prepare(model, *arguments)
    torch.manual_seed(0)
    return model


@wraps("KB507")
def class_patched(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    cls = type(model.get_input_embeddings())
    cls.forward = lambda self, x, original=cls.forward: original(self, x)
    return prepare(model, *arguments)


@wraps("KB507", alone=True)
def logging_turned_down(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    log = logging.getLogger("accelerate")
    log.setLevel(log.level + 1)
    return prepare(model, *arguments)


@spoils("KB507")
def a_model_that_draws_when_switched_on(model: Any) -> None:
    before_enabling(model, lambda self, kwargs: torch.rand(1))


def _in_the_second_step(model: Any, action: Callable[[], object]) -> None:
    """Have the first block act when it has run in train mode once."""
    runs = []

    def act(module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            runs.append(1)
            if len(runs) == 2:
                action()

    blocks(model)[0].register_forward_pre_hook(act)


@wraps("KB513")
def a_thread_started_in_a_step(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    model = prepare(model, *arguments)
    _in_the_second_step(model, threading.Thread(target=time.sleep, args=(600,), daemon=True).start)
    return model


@breaks("KB513")
def a_function_patched_in_a_step(model: Any) -> None:
    original = torch.clamp
    _in_the_second_step(model, lambda: setattr(torch, "clamp", lambda *args, **kwargs: original(*args, **kwargs)))


@breaks("KB513", conditions="2/3")
def a_deeper_recursion_allowed_from_the_fourth_step_on(model: Any) -> None:
    steps = count(1)
    deeper = sys.getrecursionlimit() + 100

    def act(module: nn.Module, args: Any) -> None:
        if next(steps) == 4:
            sys.setrecursionlimit(deeper)

    blocks(model)[0].register_forward_pre_hook(act)


@adds("KB513", last=True)
def a_file_written_in_a_step(model: Any) -> None:
    file = Path.cwd() / "steps-of-a-model.log"
    weakref.finalize(model, file.unlink, missing_ok=True)
    _in_the_second_step(model, file.touch)


@breaks("KB513")
def a_process_started_in_a_step(model: Any) -> None:
    _in_the_second_step(model, lambda: subprocess.run([sys.executable, "--version"], capture_output=True, check=False))


@adds("KB513", last=True)
def a_message_sent_in_a_step(model: Any) -> None:
    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"a step", ("127.0.0.1", 9))

    _in_the_second_step(model, send)


@breaks("KB513")
def a_line_printed_in_a_step(model: Any) -> None:
    _in_the_second_step(model, lambda: print("a step"))


@adds("KB513", last=True)
def progress_on_standard_error(model: Any) -> None:
    _in_the_second_step(model, lambda: sys.stderr.write("50 %\r"))


_old: list[torch.Tensor] = []


@wraps("KB508")
def old_weights_kept(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    _old[:] = [p.data for p in model.parameters()]
    return prepare(model, *arguments)


@breaks("KB508")
def activations_outlive_the_step(model: Any) -> None:
    hoard(model, [module for block in blocks(model) for module in block.modules()])


@breaks("KB508")
def evaluations_hoarded(model: Any) -> None:
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if not module.training and not torch.is_inference_mode_enabled():
            kept.append(output.logits.detach())

    model.register_forward_hook(keep)


@breaks("KB508", conditions="2/3")
def the_fifth_output_kept(model: Any) -> None:
    steps, kept = count(1), list[torch.Tensor]()

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if next(steps) % 5 == 0:
            kept.append(output.detach())

    blocks(model)[0].mlp.register_forward_hook(keep)


@wraps("KB509")
def a_warning_a_call(prepare: Prepare, model: Any, *arguments: Any) -> Any:
    warnings.warn("preparing a model", UserWarning, stacklevel=2)
    return prepare(model, *arguments)


@spoils("KB509")
def a_model_that_warns_when_switched_on(model: Any) -> None:
    before_enabling(model, lambda self, kwargs: warnings.warn("switching on", FutureWarning, stacklevel=2))


@breaks("KB510")
def a_module_renamed(model: Any) -> None:
    model.transformer.last_norm = model.transformer.ln_f


class _CastOutputToFloat(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return super().forward(x).float()


@adds("KB510")
def wraps_the_head(model: Any) -> None:
    """As PEFT 0.2 did."""
    model.lm_head = _CastOutputToFloat(model.lm_head)


@breaks("KB511")
def config_rewritten(model: Any) -> None:
    model.config.layer_norm_epsilon = 0.5


@adds("KB511")
def rewrites_the_configuration(model: Any) -> None:
    model.config._attn_implementation = "sdpa"


_calls = {"n": 0}


@breaks("KB512")
def depends_on_earlier_calls(model: Any) -> None:
    _calls["n"] += 1
    with torch.no_grad():
        model.transformer.ln_f.weight.add_(1e-3 * _calls["n"])


@adds("KB512")
def draws_the_embedding_of_the_padding(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[-1].normal_(std=0.02)
