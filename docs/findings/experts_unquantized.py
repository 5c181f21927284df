"""transformers 5 stores Mixtral's experts as 3-D parameters, which bitsandbytes does not quantize."""

import sys
from tempfile import TemporaryDirectory

import torch
from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

config = MixtralConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
config.num_attention_heads, config.num_key_value_heads = 4, 4
with TemporaryDirectory() as folder:
    MixtralForCausalLM(config).to(dtype=torch.bfloat16).save_pretrained(folder)
    quantized = MixtralForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
packed = sum(2 * p.numel() for p in quantized.parameters() if type(p).__name__ == "Params4bit")
experts = sum(p.numel() for n, p in quantized.named_parameters() if p.ndim == 3 and p.is_floating_point())
print(f"weights in 4 bits: {packed:,}; weights of experts left in bfloat16: {experts:,}")
sys.exit(0 if experts > packed else 1)
