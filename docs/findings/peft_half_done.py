"""If an architecture cannot checkpoint, PEFT's preparation raises after it has frozen and upcast the model."""

import sys
from tempfile import TemporaryDirectory

import torch
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, OpenAIGPTConfig, OpenAIGPTLMHeadModel

with TemporaryDirectory() as folder:
    config = OpenAIGPTConfig(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    OpenAIGPTLMHeadModel(config).to(dtype=torch.bfloat16).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = OpenAIGPTLMHeadModel.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=quantization
    )
before = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
raised = ""
try:
    prepare_model_for_kbit_training(model)
except ValueError as error:
    raised = str(error)
changed = sum((p.dtype, p.requires_grad) != before[n] for n, p in model.named_parameters())
hooks = len(model.get_input_embeddings()._forward_hooks)
print(f"raised {raised!r}, with {changed} of {len(before)} parameters changed and {hooks} hook left")
sys.exit(0 if raised and changed else 1)
