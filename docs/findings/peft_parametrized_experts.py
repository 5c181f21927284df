"""PEFT's adapters on experts that are parametrized in 4 bits: one of two gets no gradient, and the second step raises."""

import sys
import warnings

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from transformers import GptOssConfig, GptOssForCausalLM

warnings.simplefilter("ignore")
config = GptOssConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=4)
config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.num_experts_per_tok = 2, 2, 32, 2
config._experts_implementation = "eager"
base, ids = GptOssForCausalLM(config), torch.arange(8).unsqueeze(0)
experts = "model.layers.0.mlp.experts"  # the end alone matches nothing
for name in (names := ["gate_up_proj", "down_proj"]):
    replace_parameter_4bit(base.get_submodule(experts), name)
targets = [f"{experts}.{name}" for name in names]
config = LoraConfig(r=4, target_modules=[], target_parameters=targets, init_lora_weights=False)
model = get_peft_model(base, config).train()
model(input_ids=ids, labels=ids).loss.backward()
none = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
try:
    model(input_ids=ids, labels=ids)
    raised = "runs"
except RuntimeError as error:
    raised = str(error)
print(f"adapters without a gradient: {len(none)} of 4; the second forward: {raised}")
sys.exit(0 if none or raised != "runs" else 1)
