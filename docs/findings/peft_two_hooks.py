"""One preparation by PEFT leaves two hooks on the embedding, two leave four, and disabling removes one."""

import sys
from tempfile import TemporaryDirectory

from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
with TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, quantization_config=quantization)
hooks = model.get_input_embeddings()._forward_hooks
prepare_model_for_kbit_training(model)
once = len(hooks)
prepare_model_for_kbit_training(model)
twice = len(hooks)
model.disable_input_require_grads()
print(f"hooks on the embedding: {once} after one call, {twice} after two, {len(hooks)} after disabling")
sys.exit(0 if once > 1 and twice > once and len(hooks) else 1)
