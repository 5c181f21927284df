"""PEFT casts what lies around 4-bit parametrized experts to float32, and leaves the dtype in which they are read as it was."""

import sys

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import prepare_model_for_kbit_training
from transformers import GptOssConfig, GptOssForCausalLM

config = GptOssConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=4)
config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.num_experts_per_tok = 2, 2, 32, 2
config._experts_implementation = "eager"
model = GptOssForCausalLM(config).to(torch.bfloat16)
for name in ("gate_up_proj", "down_proj"):
    replace_parameter_4bit(model.model.layers[0].mlp.experts, name)
model.is_loaded_in_4bit = True  # as of a model that is quantized on load
ids = torch.arange(8).unsqueeze(0)
before = model(input_ids=ids).logits
prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
try:
    model(input_ids=ids)
    raised = ""
except RuntimeError as error:
    raised = str(error)
print(f"runs before: {bool(torch.isfinite(before).all())}; after prepare_model_for_kbit_training: {raised or 'runs'}")
sys.exit(0 if "dtype" in raised else 1)
