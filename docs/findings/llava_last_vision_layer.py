"""LLaVA reads the second to last layer of its vision tower, so that the last layer gets no gradient."""

import sys

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
vision.image_size, vision.patch_size = 16, 8
text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=63, image_seq_length=4)
model = LlavaForConditionalGeneration(config)
ids = torch.tensor([[1, 63, 63, 63, 63, 2, 3]])
model(input_ids=ids, pixel_values=torch.ones(1, 3, 16, 16), labels=ids).loss.backward()
reached = [
    any(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if f"encoder.layers.{i}." in n)
    for i in range(3)
]
print(f"vision layers reached by a gradient: {reached}")
sys.exit(0 if reached == [True, True, False] else 1)
