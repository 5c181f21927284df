"""Without a GPU, transformers unpacks an FP8 checkpoint on load: the model that comes back rounds no inputs."""

import sys

import torch
from transformers import FineGrainedFP8Config
from transformers.quantizers import AutoHfQuantizer

if torch.cuda.is_available():
    sys.exit("this shows on a machine without a GPU")
quantizer = AutoHfQuantizer.from_config(FineGrainedFP8Config(), pre_quantized=True)
try:
    quantizer.validate_environment(device_map={"": "cpu"})
except RuntimeError as error:
    print(f"transformers refuses the checkpoint: {error}")
    sys.exit(1)
print("transformers unpacks the checkpoint:", quantizer.quantization_config.dequantize)
sys.exit(0 if quantizer.quantization_config.dequantize else 1)
