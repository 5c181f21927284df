"""Faults of adapters that training scripts put on: KB102 and KB302."""

from typing import Any

from kbitcheck_reference import prepare_model_for_kbit_training

from kbitcheck.observe import internals
from kbitcheck.sabotage.fault import trains
from kbitcheck.sabotage.helpers import blocks, subclass
from kbitcheck.sabotage.watched import Script


def of_peft(script: Script, **fields: Any) -> None:
    """Prepare the model, and attach PEFT's adapters."""
    from peft import LoraConfig

    prepare_model_for_kbit_training(script.model)
    script.model.add_adapter(LoraConfig(r=4, target_modules=["k_proj", "v_proj"], **fields))
    for module in script.model.modules():
        base = getattr(module, "base_layer", None)
        if base is not None and base.bias is not None:
            base.bias.requires_grad_(True)  # as PEFT itself leaves it


@trains("KB102")
def one_factor_for_two_layers(script: Script) -> None:
    script.prepare()
    attention = blocks(script.model)[-1].self_attn
    attention.v_proj.lora_B = attention.k_proj.lora_B
    script.train(script.adamw())


@trains("KB102", config={"attention_bias": True})
def one_configured_bias_frozen(script: Script) -> None:
    of_peft(script, bias="lora_only")
    blocks(script.model)[-1].self_attn.k_proj.base_layer.bias.requires_grad_(False)
    script.train(script.adamw())


@trains("KB102", config={"attention_bias": True})
def one_bias_for_two_layers(script: Script) -> None:
    of_peft(script, bias="lora_only")
    attention = blocks(script.model)[-1].self_attn
    attention.v_proj.base_layer.bias = attention.k_proj.base_layer.bias
    script.train(script.adamw())


@trains("KB302")
def a_factor_that_the_layers_own_code_detaches(script: Script) -> None:
    """Their class is PEFT's: a twin that ran their code would detach it, too."""
    of_peft(script)

    def forward(self: Any, x: Any) -> Any:
        held: Any = internals.own_parameters(self.lora_B["default"])
        factor = held["weight"]
        held["weight"] = factor.detach()
        try:
            return super(type(self), self).forward(x)
        finally:
            held["weight"] = factor

    for block in blocks(script.model):
        subclass(block.self_attn.k_proj, forward=forward)
    script.train(script.adamw())
