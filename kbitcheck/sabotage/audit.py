"""Faults of KB802 and KB9xx."""

import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kbitcheck import backends
from kbitcheck.models.stored import remember
from kbitcheck.sabotage.fault import spoils
from kbitcheck.sabotage.helpers import corrupt, dequantize, layer_of, quantized, subclass


@spoils("KB802", quant="int8")
def a_row_whose_scale_is_zero(model: Any) -> None:
    corrupt(quantized(model)[0], "scale", 0.0)


@spoils("KB901")
def most_layers_left_unquantized(model: Any) -> None:
    for name in [name for name, _ in backends.quantized_layers(model) if not name.endswith("c_attn")]:
        dequantize(model, name, torch.bfloat16)


@spoils("KB902", model="tiny:mixtral")
def experts_unquantized_and_upcast(model: Any) -> None:
    """Needed in transformers 4, where experts are linear layers; in transformers 5 they are unquantized 3-D parameters."""
    for name, layer in list(backends.quantized_layers(model)):
        if ".experts." in name:
            rows, columns = backends.recognition(layer).shape(layer)
            model.set_submodule(name, nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))


@spoils("KB903", checkpointing="off")
def an_architecture_that_cannot_checkpoint(model: Any) -> None:
    subclass(model, supports_gradient_checkpointing=False)


@spoils("KB904")
def a_block_nothing_reads(model: Any) -> None:
    model.transformer.h[1].register_forward_hook(
        lambda module, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
    )


@spoils("KB905")
def a_router_among_the_targets(model: Any) -> None:
    subclass(model.transformer.h[0].mlp.c_fc, "TopKRouter")


@spoils("KB906")
def a_parameter_the_configuration_does_not_tell_of(model: Any) -> None:
    model.register_parameter("unforeseen", nn.Parameter(torch.zeros(64)))


@spoils("KB907")
def a_norm_of_an_unknown_class(model: Any) -> None:
    subclass(model.transformer.ln_f, "Scale")


@spoils("KB908")
def code_from_the_repository(model: Any) -> None:
    model.config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}


@spoils("KB909", quant="nf4,skip=c_fc")
def a_skipped_layer_is_quantized(model: Any) -> None:
    name = "transformer.h.1.mlp.c_fc"
    model.set_submodule(name, layer_of("tiny:gpt2", "nf4", name))


@spoils("KB910")
def a_classifier_among_the_quantized_layers(model: Any) -> None:
    model.classifier = layer_of("tiny:gpt2", "nf4", "transformer.h.1.mlp.c_fc")


@spoils("KB912")
def a_layer_quantized_by_another_scheme(model: Any) -> None:
    name = "transformer.h.1.mlp.c_fc"
    model.set_submodule(name, layer_of("tiny:gpt2", "fp4", name))


def packed_checkpoint(model: Any) -> Path:
    """A checkpoint of the model as it is now, which it then counts as loaded from; gone with the model."""
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name)
    remember(model, Path(folder.name))
    weakref.finalize(model, folder.cleanup)
    return Path(folder.name)


@spoils("KB911")
def a_scale_that_is_not_the_files(model: Any) -> None:
    packed_checkpoint(model)
    corrupt(quantized(model)[1], "scale")


@spoils("KB911")
def packed_weights_without_a_layer(model: Any) -> None:
    """As of experts that the release that saved the checkpoint had one by one."""
    file = packed_checkpoint(model) / "model.safetensors"
    tensors = load_file(file)
    expert = "transformer.h.0.mlp.experts.0.w1.weight"
    save_file(
        {**tensors, expert: torch.zeros(8, 1, dtype=torch.uint8), f"{expert}.absmax": torch.ones(1)},
        file,
        {"format": "pt"},
    )


@spoils("KB913")
def a_quantizer_that_does_not_train(model: Any) -> None:
    subclass(model.hf_quantizer, is_trainable=False)
