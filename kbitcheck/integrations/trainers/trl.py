"""What TRL's ``SFTTrainer`` does to a quantized model.

TRL has no function for it: a trainer is made, and its adapter and its forward, which belongs to one model, are removed again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kbitcheck_reference.adapters import adapter_parameters

from kbitcheck import backends
from kbitcheck.integrations.trainers.checkpointing import switch_on
from kbitcheck.observe.in_place import random_states_restored

with random_states_restored():  # imports draw from them, and the trainer seeds them when it is made
    from accelerate.state import AcceleratorState, PartialState
    from datasets import Dataset
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

PAD = "<pad>"


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """The model, frozen, as it is when training begins. A model that has adapters gets no others, and is not frozen."""
    if not adapter_parameters(model):
        _make_trainer(model, use_gradient_checkpointing)
    if use_gradient_checkpointing:  # the first that train() does
        switch_on(model, gradient_checkpointing_kwargs)
    return model


def _make_trainer(model: Any, use_gradient_checkpointing: bool) -> None:
    """Make a trainer with an adapter on one layer, and take the adapter off again."""
    layer = next(name for name, _ in backends.quantized_layers(model))
    words = Tokenizer(models.WordLevel({PAD: 0}, unk_token=PAD))
    with tempfile.TemporaryDirectory() as folder, random_states_restored(), _padding_restored(model):
        try:
            SFTTrainer(
                model,
                args=SFTConfig(
                    output_dir=folder,
                    bf16=False,
                    use_cpu=model.device.type == "cpu",
                    gradient_checkpointing=use_gradient_checkpointing,
                    report_to=[],
                    dataset_kwargs={"skip_prepare_dataset": True},
                ),
                train_dataset=Dataset.from_dict({"input_ids": [[0]]}),
                processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=PAD),
                peft_config=LoraConfig(r=1, target_modules=[layer]),
            )
        finally:
            bare = model.get_submodule(layer)
            if isinstance(bare, LoraLayer):
                model.set_submodule(layer, bare.get_base_layer())
            for name in ("peft_config", "forward"):
                vars(model).pop(name, None)
            AcceleratorState._reset_state()
            PartialState._reset_state()


@contextmanager
def _padding_restored(model: Any) -> Iterator[None]:
    """Put back which token pads: the trainer sets its tokenizer's, which here is none of the model's."""
    configs = [c for c in (model.config.get_text_config(), getattr(model, "generation_config", None)) if c is not None]
    before = [(config, getattr(config, "pad_token_id", None)) for config in configs]
    try:
        yield
    finally:
        for config, token in before:
            config.pad_token_id = token
