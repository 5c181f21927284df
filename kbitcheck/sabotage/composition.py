"""Faults of KB701, KB702, KB704, KB705, KB708 and KB741 to KB745: what scripts do wrong around a prepared model."""

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from kbitcheck.sabotage.fault import composes
from kbitcheck.sabotage.hooks import change_output


@composes("KB701", "ddp")
def checkpointed_again_by_one_rank(run: Any) -> None:
    """Reentrant, in a wrap that looks for unused parameters."""

    def wrap(model: Any, adapters: Any) -> Any:
        if run.rank == 1:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)

    run.wrap = wrap


@composes("KB701", "ddp")
def adapters_left_out_of_the_wrap(run: Any) -> None:
    """They are thawed after it: a wrap holds what requires grad when it is made."""

    def wrap(model: Any, adapters: Any) -> Any:
        left_out = [parameter for name, parameter in adapters.items() if ".0." in name]
        for parameter in left_out:
            parameter.requires_grad_(False)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for parameter in left_out:
            parameter.requires_grad_(True)
        return wrapped

    run.wrap = wrap


@composes("KB701", "ddp")
def adapters_drawn_by_each_rank(run: Any) -> None:
    """After the wrap, which broadcasts what is there when it is made."""
    own = run.wrap

    def wrap(model: Any, adapters: Any) -> Any:
        wrapped = own(model, adapters)
        torch.manual_seed(run.rank)
        for parameter in adapters.values():
            parameter.data.mul_(1 + 0.1 * torch.rand(()))
        return wrapped

    run.wrap = wrap


@composes("KB701", "ddp")
def one_batch_for_all_ranks(run: Any) -> None:
    run.data = lambda: run.row(0)


@composes("KB702", "fsdp2")
def adapters_of_two_dtypes_in_a_unit(run: Any) -> None:
    own = run.wrap

    def wrap(model: Any, adapters: Any) -> Any:
        for name, parameter in adapters.items():
            if "q_proj" in name:
                parameter.data = parameter.data.bfloat16()
        return own(model, adapters)

    run.wrap = wrap


@composes("KB741", "fsdp2")
def an_adapter_outside_the_units(run: Any) -> None:
    own = run.ignored

    def ignored(model: Any) -> Any:
        return own(model) | {p for n, p in model.named_parameters() if "q_proj.lora" in n}

    run.ignored = ignored


@composes("KB704", "compile")
def half_a_gradient_where_it_is_captured(run: Any) -> None:
    own = run.wrap

    def wrap(model: Any, adapters: Any) -> Any:
        block = model.base_model.model.model.layers[0].mlp
        change_output(block, lambda x: x / 2 if torch.compiler.is_compiling() else x)
        return own(model, adapters)

    run.wrap = wrap


@composes("KB705", "copy")
def a_pickle_that_is_frozen(run: Any) -> None:
    ways = run.copied()

    def frozen(model: Any) -> Any:
        return ways["the pickle"](model).requires_grad_(False)

    run.copied = lambda: {**ways, "the pickle": frozen}


@composes("KB708", "resume")
def resumed_without_the_optimizers_state(run: Any) -> None:
    own = run.load

    def load(adapters: Any, parts: Any) -> None:
        state = copy.deepcopy(parts["optimizer"].state_dict()["state"])
        own(adapters, parts)
        parts["optimizer"].load_state_dict({**parts["optimizer"].state_dict(), "state": state})

    run.load = load


@composes("KB708", "resume")
def resumed_without_the_scheduler(run: Any) -> None:
    own = run.load
    run.load = lambda adapters, parts: own(adapters, {n: p for n, p in parts.items() if n != "scheduler"})


@composes("KB708", "resume")
def resumed_without_random_states(run: Any) -> None:
    own = run.load

    def load(adapters: Any, parts: Any) -> None:
        states = random.getstate(), torch.get_rng_state()
        own(adapters, parts)
        random.setstate(states[0])
        torch.set_rng_state(states[1])

    run.load = load


@composes("KB708", "resume")
def resumed_without_numpys_state(run: Any) -> None:
    own = run.load

    def load(adapters: Any, parts: Any) -> None:
        state = np.random.get_state()
        own(adapters, parts)
        np.random.set_state(state)

    run.load = load


@composes("KB708", "resume")
def resumed_without_the_gradient_scaler(run: Any) -> None:
    own = run.load
    run.load = lambda adapters, parts: own(adapters, {n: p for n, p in parts.items() if n != "scaler"})


@composes("KB708", "resume")
def resumed_at_the_beginning_of_the_data(run: Any) -> None:
    own = run.load
    run.load = lambda adapters, parts: own(adapters, {n: p for n, p in parts.items() if n != "order"})


@composes("KB708", "resume")
def resumed_without_the_accumulations_counter(run: Any) -> None:
    own = run.load

    def load(adapters: Any, parts: Any) -> None:
        own(adapters, parts)
        parts["accumulation"].passes = 0

    run.load = load


@composes("KB708", "resume")
def resumed_without_accumulated_gradients(run: Any) -> None:
    own = run.load

    def load(adapters: Any, parts: Any) -> None:
        own(adapters, parts)
        for parameter in adapters.values():
            parameter.grad = None

    run.load = load


def _resumed_without(run: Any, part: str) -> None:
    """A file of the checkpoint is gone before the second process resumes from it."""
    own = run.resumed

    def resumed() -> Any:
        if run.rank:
            (run.checkpoint / part).unlink()
        return own()

    run.resumed = resumed


@composes("KB708", "trainer-resume")
def a_checkpoint_without_the_optimizer(run: Any) -> None:
    _resumed_without(run, "optimizer.pt")


@composes("KB708", "trainer-resume")
def a_checkpoint_without_random_states(run: Any) -> None:
    _resumed_without(run, "rng_state.pth")


@composes("KB708", "trainer-resume")
def data_that_a_trainer_begins_again(run: Any) -> None:
    """``ignore_data_skip``."""
    own = run.options
    run.options = lambda: {**own(), "ignore_data_skip": True}


@composes("KB708", "trainer-resume")
def a_trainer_that_starts_again(run: Any) -> None:
    run.resumed = dict


@composes("KB742", "trainer")
def a_trainer_that_counts_its_loss_twice(run: Any) -> None:
    own = run.trainer

    def trainer(model: Any) -> Any:
        made = own(model)
        compute = made.compute_loss
        made.compute_loss = lambda *args, **kwargs: 2 * compute(*args, **kwargs)
        return made

    run.trainer = trainer


@composes("KB743", "accumulate")
def accumulated_losses_that_nobody_divides(run: Any) -> None:
    own = run.trainer

    def trainer(model: Any) -> Any:
        made = own(model)
        compute = made.compute_loss
        made.compute_loss = lambda *args, **kwargs: run.accumulated * compute(*args, **kwargs)
        return made

    run.trainer = trainer


@composes("KB744", "ddp")
def a_norm_that_one_rank_moves(run: Any) -> None:
    own = run.backward

    def backward(model: Any, batch: Any) -> None:
        own(model, batch)
        if run.rank == 1:
            model.module.base_model.model.model.norm.weight.data.mul_(1.001)

    run.backward = backward


@composes("KB745", "trainer")
def a_trainer_that_switches_checkpointing_off(run: Any) -> None:
    own = run.trainer

    def trainer(model: Any) -> Any:
        model.base_model.model.gradient_checkpointing_disable()
        return own(model)

    run.trainer = trainer
