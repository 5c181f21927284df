"""Faults of training scripts: KB313 and KB7xx."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from kbitcheck_reference import LoraLinear, lora, prepare_model_for_kbit_training

from kbitcheck import backends
from kbitcheck.sabotage.fault import trains
from kbitcheck.sabotage.helpers import blocks, enable
from kbitcheck.sabotage.hooks import change_output


class Script:
    """A training script with a loaded quantized model and a batch; ``train`` takes the steps of a plain loop.

    ``rank`` is that of its process, of several.
    """

    def __init__(self, model: Any, batch: Mapping[str, torch.Tensor], rank: int = 0) -> None:
        self.model, self.rank = model, rank
        self.batch = dict(batch)

    def prepare(self, **arguments: Any) -> None:
        """Prepare the model, and attach adapters."""
        prepare_model_for_kbit_training(self.model, gradient_checkpointing_kwargs=arguments or None)
        lora.attach(self.model, rank=4, alpha=8.0)

    @property
    def trained(self) -> list[Any]:
        """What requires grad."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def adamw(self, rate: float = 1e-3) -> Any:
        return torch.optim.AdamW(self.trained, lr=rate)

    def train(self, optimizer: Any, *, accumulate: int = 1, divide: int = 1, mode: bool = True, **passed: Any) -> None:
        """Two optimizer steps; ``mode`` is that of the model."""
        self.model.train(mode)
        for _ in range(2):
            for _ in range(accumulate):
                loss = self.model(**self.batch, **passed).loss / divide
                if loss.requires_grad:
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def halved(parameters: list[Any]) -> Iterator[Any]:
    """The parameters, cast to bfloat16 in place."""
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
        yield parameter


@trains("KB313")
def adapters_cast_to_bfloat16(script: Script) -> None:
    script.prepare()
    script.train(torch.optim.AdamW([*halved(script.trained)], lr=1e-5))


@trains("KB313")
def adapters_cast_behind_the_optimizer(script: Script) -> None:
    script.prepare()
    optimizer = script.adamw()
    _ = [*halved(script.trained)]
    script.train(optimizer)


@trains("KB703")
def checkpointing_switched_on_again(script: Script) -> None:
    script.prepare(use_reentrant=True, preserve_rng_state=False)
    enable(script.model, None)
    script.train(script.adamw())


@trains("KB706")
def float32_enters_every_layer(script: Script) -> None:
    """Of a model that nobody upcast, as a hook that was left on."""
    script.model.requires_grad_(False)
    lora.attach(script.model, rank=4, alpha=8.0)
    for _, layer in backends.quantized_layers(script.model):
        layer.register_forward_pre_hook(lambda module, args: (args[0].float(),), prepend=True)
        layer.register_forward_hook(lambda module, args, output: output.bfloat16())
    script.train(script.adamw())


@trains("KB707")
def losses_divided_twice(script: Script) -> None:
    script.prepare()
    script.train(script.adamw(), accumulate=2, divide=4)


@trains("KB710")
def optimizer_built_before_adapters(script: Script) -> None:
    optimizer = script.adamw()
    script.prepare()
    script.train(optimizer)


@trains("KB711")
def every_update_rounded_away(script: Script) -> None:
    script.prepare()
    script.train(torch.optim.AdamW([*halved(script.trained)], lr=1e-8))


@trains("KB712")
def a_learning_rate_of_zero(script: Script) -> None:
    script.prepare()
    script.train(script.adamw(0.0))


@trains("KB712")
def a_learning_rate_that_ends(script: Script) -> None:
    script.prepare()
    optimizer = script.adamw()
    vars(optimizer)["zero_grad"] = lambda: (optimizer.param_groups[0].update(lr=0.0), script.model.zero_grad())
    script.train(optimizer)
    script.train(optimizer)


@trains("KB712")
def an_epsilon_that_dwarfs_gradients(script: Script) -> None:
    script.prepare()
    script.train(torch.optim.Adam(script.trained, lr=1e-3, eps=1e3))


@trains("KB713")
def an_infinite_norm(script: Script) -> None:
    script.prepare()
    with torch.no_grad():
        next(p for n, p in script.model.named_parameters() if "norm" in n).fill_(torch.inf)
    script.train(script.adamw())


@trains("KB714")
def every_label_ignored(script: Script) -> None:
    script.prepare()
    script.batch["labels"] = torch.full_like(script.batch["labels"], -100)
    script.train(script.adamw())


@trains("KB714")
def a_loss_of_its_own_that_is_shifted_back(script: Script) -> None:
    script.prepare()
    optimizer, tokens = script.adamw(), script.batch.pop("labels").clamp(min=0)
    for _ in range(2):
        logits = script.model.train()(**script.batch).logits[:, 1:].float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :-1].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@trains("KB715")
def a_block_cut_off(script: Script) -> None:
    script.prepare()
    cut: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
    change_output(blocks(script.model)[0], cut)
    script.train(script.adamw())


def scaled(script: Script, between: Callable[[], object] = lambda: None) -> None:
    """Two steps under a gradient scaler; ``between`` runs between backward and step."""
    optimizer, scaler = script.adamw(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    script.model.train()
    for _ in range(2):
        scaler.scale(script.model(**script.batch).loss).backward()
        between()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@trains("KB717")
def every_step_skipped(script: Script) -> None:
    script.prepare()
    script.trained[0].register_hook(lambda gradient: gradient * torch.inf)
    scaled(script)


@trains("KB717")
def clipped_before_it_is_unscaled(script: Script) -> None:
    script.prepare()
    scaled(script, lambda: torch.nn.utils.clip_grad_norm_(script.trained, 1e-3))


@trains("KB718")
def trained_in_eval_mode(script: Script) -> None:
    script.prepare(use_reentrant=False)
    script.train(script.adamw(), mode=False)


@trains("KB718")
def decoder_in_eval_mode_with_a_cache(script: Script) -> None:
    """The cache of a decoder that checkpoints is left out in train mode alone, by transformers."""
    script.prepare(use_reentrant=False)
    script.model.config.use_cache = True
    decoder = script.model.base_model.eval()
    vars(decoder)["train"] = lambda mode=True: decoder
    script.train(script.adamw())


@trains("KB720")
def gradients_never_cleared(script: Script) -> None:
    script.prepare()
    optimizer = script.adamw()
    vars(optimizer)["zero_grad"] = lambda: None
    script.train(optimizer)


@trains("KB721")
def padding_counts_in_the_loss(script: Script) -> None:
    script.prepare()
    tokens = script.batch["input_ids"]
    mask = torch.ones_like(tokens)
    mask[:, -4:] = 0
    script.batch |= {"attention_mask": mask, "labels": tokens.clone()}
    script.train(script.adamw())


@trains("KB721")
def every_token_at_one_position(script: Script) -> None:
    script.prepare()
    script.train(script.adamw(), position_ids=torch.zeros_like(script.batch["input_ids"]))


@trains("KB721", model="tiny:t5")
def a_decoder_that_reads_its_labels(script: Script) -> None:
    script.prepare()
    script.train(script.adamw(), decoder_input_ids=script.batch["labels"].clamp(min=0))


@trains("KB722")
def what_a_block_returns_inside_is_kept(script: Script) -> None:
    script.prepare()
    kept: list[Any] = []
    for inner in blocks(script.model)[0].children():
        inner.register_forward_hook(lambda module, args, output: kept.append(output))
    script.train(script.adamw())


@trains("KB719")
def a_warning_among_many(script: Script) -> None:
    script.prepare()
    log = logging.getLogger("a library")
    for text in ("a new release is there", "None of the inputs have requires_grad=True. Gradients will be None"):
        log.warning(text)
    script.train(script.adamw())


@trains("KB716")
def a_cache_asked_for(script: Script) -> None:
    script.prepare()
    script.train(script.adamw(), use_cache=True)


@trains("KB723")
def a_row_detached_before_the_head(script: Script) -> None:
    script.prepare()
    batch = {name: value.expand(2, *value.shape[1:]) for name, value in script.batch.items()}
    script.batch = {name: value.contiguous() for name, value in batch.items()}
    head = script.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: (torch.cat([args[0][:1], args[0][1:].detach()]),))
    script.train(script.adamw())


@trains("KB724")
def state_thrown_away_after_each_step(script: Script) -> None:
    script.prepare()
    optimizer = script.adamw()
    vars(optimizer)["zero_grad"] = lambda: (optimizer.state.clear(), script.model.zero_grad())
    script.train(optimizer)


@trains("KB727")
def a_schedule_stepped_with_every_batch(script: Script) -> None:
    script.prepare()
    optimizer = script.adamw()
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)

    def behind(*_: object) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer's first step comes later
            schedule.step()

    script.model.register_forward_hook(behind)
    script.train(optimizer, accumulate=2, divide=2)


@trains("KB725")
def adapters_scaled_to_nothing(script: Script) -> None:
    script.prepare()
    for module in script.model.modules():
        if isinstance(module, LoraLinear):
            module.scaling = 0.0
    script.train(script.adamw())


@trains("KB726")
def outputs_kept_from_step_to_step(script: Script) -> None:
    script.prepare()
    kept: list[Any] = []
    for block in blocks(script.model):
        block.register_forward_hook(lambda module, args, output: kept.append(output))
    optimizer = script.adamw()
    script.train(optimizer)
    script.train(optimizer)


@trains("KB728", ranks=2)
def a_rank_that_averages_no_gradients(script: Script) -> None:
    script.prepare()
    script.batch = {name: value.roll(script.rank, 1) for name, value in script.batch.items()}
    script.train(script.adamw())


@trains("KB728", ranks=2)
def a_rank_that_draws_its_own_adapters(script: Script) -> None:
    script.prepare()
    for parameter in script.trained[: script.rank]:
        parameter.data = parameter.data.flip(0)
    script.train(script.adamw())
