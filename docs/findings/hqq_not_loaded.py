"""transformers 5 takes an HQQ configuration and then refuses to load a model by it, quantized already or not."""

import sys
import tempfile

import hqq.core.quantize  # noqa: F401  (without the package it is the package that is missing)
from transformers import AutoModelForCausalLM, HqqConfig, LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(folder)
    try:
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=HqqConfig(nbits=4, group_size=64))
    except NotImplementedError as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(0)
print("loaded")
sys.exit(1)
