"""A real ``Trainer`` of transformers, alone and with accumulated batches, and TRL's ``SFTTrainer``."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kbitcheck.core.errors import Unavailable
from kbitcheck.models.inputs.text import row_count
from kbitcheck.observe.composition.steps import RATE, STEPS, Run, differing, numbers, of_base, recorded, whole
from kbitcheck.observe.probes import step


class InTrainer(Run):
    """Steps of transformers' Trainer, whose own checkpointing is off: what preparation set has to stay."""

    processes: tuple[str, ...] = ("the Trainer",)
    accumulated = 1

    def rows(self) -> list[dict[str, torch.Tensor]]:
        """The data: the first row, again and again."""
        return [self._example(self.row(0))] * (STEPS * self.accumulated)

    def _example(self, row: step.Batch) -> dict[str, torch.Tensor]:
        return {name: tensor[0] for name, tensor in row.items()}

    def options(self) -> dict[str, Any]:
        """What both kinds of trainer are told."""
        return {
            "output_dir": self.folder,
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": self.accumulated,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "optim": "adamw_torch",
            "weight_decay": 0.0,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "bf16": self.mixed and self.preparation.loaded.half is torch.bfloat16,
            "fp16": self.mixed and self.preparation.loaded.half is torch.float16,
            "remove_unused_columns": False,
            "seed": self.seed,
        }

    @property
    def mixed(self) -> bool:
        """Whether training runs under autocast."""
        return not isinstance(self.preparation.autocast(), contextlib.nullcontext)

    def trainer(self, model: Any) -> Any:
        """The trainer of a model."""
        from transformers import Trainer, TrainingArguments

        return Trainer(
            model=model,
            args=TrainingArguments(**self.options()),
            train_dataset=self.rows(),
            data_collator=stacked,
        )

    def go(self) -> None:
        model, adapters = self.attached()
        before = of_base(model, adapters)
        trainer = self.trainer(model)
        model = trainer.model
        adapters = {n: p for n, p in model.named_parameters() if n in adapters}
        self.record["frozen"] = [n for n, p in adapters.items() if not p.requires_grad]
        with recorded(model, self.record, lambda: STEPS * self.accumulated), self._seen(adapters), quiet():
            trainer.train()
        self.record["changed"] = differing(before, of_base(model, adapters))

    @contextlib.contextmanager
    def _seen(self, adapters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Record the gradients that the trainer's optimizer uses."""
        number = 0

        def stepping(optimizer: Any, args: Any, kwargs: Any) -> None:
            nonlocal number
            number += 1
            seen = {f"{n} (step {number})": whole(p.grad) for n, p in adapters.items()}
            self.record.setdefault("gradients", {}).update(seen)
            self.record.setdefault("numbers", {})[f"before step {number}"] = numbers(adapters)

        handle = register_optimizer_step_pre_hook(stepping)
        try:
            yield
        finally:
            handle.remove()


class Accumulating(InTrainer):
    """Steps of a Trainer that adds up two batches of one row, in the place of one of two."""

    accumulated, expects = 2, "batch"

    def rows(self) -> list[dict[str, torch.Tensor]]:
        """Both rows of the batch in turn; their order in a step does not matter."""
        count = row_count(self.preparation.batch)
        if count != self.accumulated:
            raise Unavailable(f"the batch has {count} rows, and {self.accumulated} are accumulated")
        return [self._example(self.row(number)) for number in range(count)]


class InSFTTrainer(InTrainer):
    """Steps of TRL's ``SFTTrainer``, which is told to checkpoint as the preparation did."""

    processes = ("the SFTTrainer",)

    def trainer(self, model: Any) -> Any:
        """The trainer of a model, with a tokenizer of as many words as the model has."""
        if find_spec("trl") is None:
            raise Unavailable("needs TRL: pip install 'kbitcheck[trl]'")
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        row = self.row(0)
        if not row.keys() <= {"input_ids", "labels", "attention_mask"}:
            raise Unavailable("a tokenizer of words feeds models that read text alone")
        keep = (
            row["attention_mask"][0].bool() if "attention_mask" in row else torch.ones_like(row["input_ids"][0]).bool()
        )
        example = {name: row[name][0][keep].tolist() for name in ("input_ids", "labels")}
        mode = self.preparation.spec.checkpointing
        checkpointed = any(getattr(m, "gradient_checkpointing", False) is True for m in model.modules())
        options = {
            **self.options(),
            "gradient_checkpointing": checkpointed,
            "max_length": None,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
        if checkpointed and mode != "default":
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": mode == "reentrant"}
        return SFTTrainer(
            model=model,
            args=SFTConfig(**options),
            train_dataset=Dataset.from_list([example] * STEPS),
            processing_class=_tokenizer(int(model.config.get_text_config().vocab_size)),
        )


def _tokenizer(words: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w1", eos_token="w2")  # noqa: S106


def stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as a batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what a trainer says of its progress."""
    with warnings.catch_warnings(action="ignore"):
        yield
