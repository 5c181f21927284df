"""PEFT's preparation calls a method that transformers 5.23 deprecates, so that each preparation warns."""

import sys
import warnings
from tempfile import TemporaryDirectory

from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
with TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, quantization_config=quantization)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    prepare_model_for_kbit_training(model)
messages = sorted({str(w.message) for w in caught})
print(*(messages or ["no warning"]), sep="\n")
sys.exit(0 if any("deprecated" in t for t in messages) else 1)
