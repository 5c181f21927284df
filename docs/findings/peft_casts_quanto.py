"""PEFT's preparation raises on a model that optimum-quanto quantized: it casts the packed weights, which refuse."""

import sys

import torch
from optimum.quanto import freeze, qint8, quantize
from peft import prepare_model_for_kbit_training
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).to(torch.bfloat16)
quantize(model, weights=qint8)
freeze(model)
model.quantization_method = "quanto"  # as transformers marks a model that it quantized so
try:
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
except ValueError as error:
    print(f"{type(error).__name__}: {error}")
    half_done = [n for n, p in model.named_parameters() if p.dtype == torch.float32]
    print(f"left behind: {len(half_done)} parameters in float32, such as {half_done[:1]}, and checkpointing off")
    sys.exit(0)
print("no error")
sys.exit(1)
