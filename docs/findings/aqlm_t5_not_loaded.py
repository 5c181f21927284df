"""transformers 5 cannot load an AQLM checkpoint of T5, whose `_init_weights` reads a `weight` of each layer: transformers#47920."""

import sys
import tempfile

import torch
from aqlm import QuantizedLinear
from transformers import AqlmConfig, T5Config, T5ForConditionalGeneration
from transformers.integrations.aqlm import replace_with_aqlm_linear

config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
quantization = AqlmConfig(
    in_group_size=8, num_codebooks=1, nbits_per_codebook=10, linear_weights_not_to_quantize=["lm_head"]
)
with torch.device("meta"):
    model = T5ForConditionalGeneration(config)
replace_with_aqlm_linear(model, quantization.linear_weights_not_to_quantize, quantization)
model.to_empty(device="cpu").tie_weights()
for parameter in model.parameters():
    parameter.data.zero_()
model.config.quantization_config = quantization
folder = tempfile.mkdtemp()
model.save_pretrained(folder)
try:
    T5ForConditionalGeneration.from_pretrained(folder)
except AttributeError as error:
    print(f"loading what was saved, of layers of {QuantizedLinear.__module__}, raises: {error}")
    sys.exit(0)
print("what was saved is loaded")
sys.exit(1)
