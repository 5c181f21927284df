"""PEFT does not pass use_reentrant, so that torch warns in each run and uses reentrant checkpointing."""

import sys
import warnings
from tempfile import TemporaryDirectory

import torch
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
with TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, quantization_config=quantization)
prepare_model_for_kbit_training(model)
ids = torch.arange(8)[None]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.train()(input_ids=ids, labels=ids).loss.backward()
messages = [str(w.message).split(". ")[0] for w in caught if "use_reentrant" in str(w.message)]
keywords = model.model.layers[0]._gradient_checkpointing_func.keywords
print(f"arguments of torch.utils.checkpoint: {keywords}; warnings: {sorted(set(messages))}")
sys.exit(0 if messages and "use_reentrant" not in keywords else 1)
