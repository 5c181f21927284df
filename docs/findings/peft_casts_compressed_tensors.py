"""PEFT's preparation casts the scales of a compressed-tensors model, whose first forward then unpacks every weight to float32."""

import sys

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from peft import prepare_model_for_kbit_training
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).to(torch.bfloat16)
weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
config = QuantizationConfig(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
apply_quantization_config(model, config)
for module in model.modules():
    if hasattr(module, "weight_scale"):
        module.weight_scale.data = module.weight.data.unflatten(1, (-1, 32)).abs().amax(dim=-1) / 7
ModelCompressor(quantization_config=config).compress_model(model)  # as a checkpoint is loaded
model.quantization_method = "compressed-tensors"  # as transformers marks it
packed = sum(parameter.nbytes for parameter in model.parameters())
prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
scale = model.model.layers[0].mlp.up_proj.weight_scale.dtype
model(torch.arange(8).unsqueeze(0))
weight = model.model.layers[0].mlp.up_proj.weight.dtype
print(f"scales in {scale}, after a forward weights in {weight}; checkpointing: {model.is_gradient_checkpointing}")
print(f"{packed:,} bytes as loaded, {sum(parameter.nbytes for parameter in model.parameters()):,} after a forward")
sys.exit(0 if weight == torch.float32 and not model.is_gradient_checkpointing else 1)
