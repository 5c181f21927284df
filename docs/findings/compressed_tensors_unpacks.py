"""A checkpoint of compressed-tensors is packed until its first forward, which unpacks every weight for good."""

import sys
import tempfile

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=32)
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
model = LlamaForCausalLM(config).bfloat16()
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
for layer in model.modules():
    if hasattr(layer, "weight_scale"):
        layer.weight_scale.data = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 7
compressor = ModelCompressor.from_pretrained_model(model)
compressor.compress_model(model)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    compressor.update_config(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
before = sum(p.nbytes for p in loaded.model.layers.parameters())
loaded(torch.ones(1, 4, dtype=torch.long))
after = sum(p.nbytes for p in loaded.model.layers.parameters())
print(f"blocks: {before:,} bytes as loaded, {after:,} after a forward")
sys.exit(0 if after > 2 * before else 1)
