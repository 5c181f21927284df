"""SigLIP 2, LFM2-VL's vision tower, casts images to its first weight's dtype: to integers if that weight is packed."""

import sys

import bitsandbytes as bnb
import torch
from transformers import Siglip2VisionConfig, Siglip2VisionModel

config = Siglip2VisionConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, patch_size=4, num_patches=4,
    vision_use_head=False,
)  # fmt: skip
model = Siglip2VisionModel(config).to(torch.bfloat16)
embeddings = next(m for m in model.modules() if hasattr(m, "patch_embedding"))
plain = embeddings.patch_embedding
packed = bnb.nn.Linear4bit(plain.in_features, plain.out_features, compute_dtype=torch.bfloat16)
packed.load_state_dict(plain.state_dict())
embeddings.patch_embedding = packed.to("cpu")
seen = []
packed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
images = {"spatial_shapes": torch.tensor([[2, 2]]), "pixel_attention_mask": torch.ones(1, 4)}
try:
    model(torch.rand(1, 4, plain.in_features) - 0.5, **images)
except RuntimeError as error:  # the result may be integers, too
    print(error)
print(f"pixels from -0.5 to 0.5 come as {seen[0].dtype}: {sorted(set(seen[0].flatten().tolist()))}")
sys.exit(0 if not seen[0].is_floating_point() else 1)
