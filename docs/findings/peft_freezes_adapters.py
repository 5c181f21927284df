"""PEFT's preparation silently freezes the adapters of a model that already has adapters."""

import sys
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
with TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, quantization_config=quantization)
model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
before = sum(p.requires_grad for p in model.parameters())
prepare_model_for_kbit_training(model)
after = sum(p.requires_grad for p in model.parameters())
ids = torch.arange(8)[None]
model.train()(input_ids=ids, labels=ids).loss.backward()  # raises nothing: the hook on the embedding makes a graph
moved = sum(p.grad is not None for p in model.parameters())
print(f"trainable tensors: {before} before, {after} after; a backward passes and reaches {moved} of them")
sys.exit(0 if before and not after and not moved else 1)
