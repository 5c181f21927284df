"""transformers 5 converts the layers that an AQLM checkpoint's ``linear_weights_not_to_quantize`` names: it reads the list as modules."""

import sys

import torch
from aqlm import QuantizedLinear
from transformers import AqlmConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.aqlm import replace_with_aqlm_linear

config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
heads = {}
for entry in ("lm_head.weight", "lm_head"):
    described = AqlmConfig(linear_weights_not_to_quantize=[entry])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    replace_with_aqlm_linear(model, described.linear_weights_not_to_quantize, described)
    heads[entry] = type(model.lm_head).__name__
print("the head's class, by how the list names it:", heads)
sys.exit(0 if heads["lm_head.weight"] == QuantizedLinear.__name__ != heads["lm_head"] else 1)
