"""Faults of KB9xx."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.sabotage.fault import spoils


def _named(module: Any, name: str) -> None:
    """Give a module a class of another name, which is otherwise its own."""
    module.__class__ = type(name, (type(module),), {})


@spoils("KB901")
def most_layers_left_unquantized(model: Any) -> None:
    for name, layer in list(model.named_modules()):
        if backends.is_quantized(layer) and not name.endswith("c_attn"):
            rows, columns = backends.shape(layer)
            plain = nn.Linear(columns, rows, bias=layer.bias is not None, dtype=torch.bfloat16)
            plain.weight.data.copy_(backends.unpacked(layer))
            plain.bias = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)


@spoils("KB902", model="tiny:mixtral")
def experts_unquantized_and_upcast(model: Any) -> None:
    """Experts of transformers 5 are so already, 3-D parameters; those of transformers 4 are linear layers."""
    for name, module in [*model.named_modules()]:
        if ".experts." in name and backends.is_quantized(module):
            rows, columns = backends.shape(module)
            model.set_submodule(name, nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))


@spoils("KB903", checkpointing="off")
def an_architecture_that_cannot_checkpoint(model: Any) -> None:
    cls = type(model)
    model.__class__ = type(
        cls.__name__, (cls,), {"supports_gradient_checkpointing": False, "__module__": cls.__module__}
    )


@spoils("KB904")
def a_block_nothing_reads(model: Any) -> None:
    model.transformer.h[1].register_forward_hook(
        lambda module, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
    )


@spoils("KB905")
def a_router_among_the_targets(model: Any) -> None:
    _named(model.transformer.h[0].mlp.c_fc, "TopKRouter")


@spoils("KB906")
def a_parameter_the_configuration_does_not_tell_of(model: Any) -> None:
    model.register_parameter("unforeseen", nn.Parameter(torch.zeros(64)))


@spoils("KB907")
def a_norm_of_an_unknown_class(model: Any) -> None:
    _named(model.transformer.ln_f, "Scale")


@spoils("KB908")
def code_from_the_repository(model: Any) -> None:
    model.config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
