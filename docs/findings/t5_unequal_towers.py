"""T5 with more decoder than encoder blocks cannot generate: transformers makes its cache as deep as the encoder."""

import sys

import torch
from transformers import T5Config, T5ForConditionalGeneration


def generates(encoder: int, decoder: int) -> str:
    """What generation raises ("" where it works)."""
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=encoder, num_decoder_layers=decoder,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    try:
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)
    except Exception as error:
        return type(error).__name__
    return ""


same, deeper = generates(2, 2), generates(1, 2)
print(f"2 and 2 blocks: {same or 'works'}; 1 and 2 blocks: {deeper or 'works'}")
sys.exit(0 if not same and deeper else 1)
