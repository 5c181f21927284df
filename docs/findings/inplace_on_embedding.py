"""GIT cannot train once its inputs require grad: it writes images into its embedding's output in place."""

import sys

import torch
from transformers import GitConfig, GitForCausalLM

vision = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
}
config = GitConfig(
    vision_config={**vision, "patch_size": 8}, vocab_size=64, hidden_size=32, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
model = GitForCausalLM(config).requires_grad_(False).train()
model.enable_input_require_grads()
ids = torch.randint(3, 60, (1, 8))
try:
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16))
except RuntimeError as error:
    print(error)
    sys.exit(0 if "leaf Variable" in str(error) else 1)
sys.exit(1)
