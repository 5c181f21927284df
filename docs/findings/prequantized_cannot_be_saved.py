"""A model that was loaded from a bitsandbytes checkpoint cannot be saved again: transformers#45743."""

import sys
import tempfile

import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
plain, quantized, again = (tempfile.mkdtemp() for _ in range(3))
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
raised = []
for quantization in (BitsAndBytesConfig(load_in_4bit=True), BitsAndBytesConfig(load_in_8bit=True)):
    once = LlamaForCausalLM.from_pretrained(plain, quantization_config=quantization, device_map={"": "cpu"})
    once.save_pretrained(quantized)
    try:
        LlamaForCausalLM.from_pretrained(quantized, device_map={"": "cpu"}).save_pretrained(again)
    except NotImplementedError as error:
        raised.append(repr(error))
print("saving what was loaded from a 4-bit and from an 8-bit checkpoint raises:", raised)
sys.exit(0 if len(raised) == 2 else 1)
