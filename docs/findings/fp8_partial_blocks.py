"""Without a GPU, transformers unpacks an FP8 checkpoint by blocks of rows // scales: wrong, or not at all, where the last block is smaller."""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 32, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 1}
if torch.cuda.is_available():
    sys.exit("this shows on a machine without a GPU")
model = LlamaForCausalLM(LlamaConfig(**sizes))
tensors = model.state_dict()
for name in [n for n in tensors if "proj" in n]:
    tensors[name] = torch.ones(48, 48).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # a block of 32 rows and columns, then 16
model.config.quantization_config = FineGrainedFP8Config(weight_block_size=(32, 32)).to_dict()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder, state_dict=tensors)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.float32)
    except RuntimeError as error:
        print(f"transformers refuses the checkpoint: {error}")
        sys.exit(1)
weight = model.model.layers[0].mlp.up_proj.weight
print("row 30 is to be 1, and 2 from column 32 on:", weight[30].tolist())
sys.exit(0 if weight[30, 31] != 1 else 1)
