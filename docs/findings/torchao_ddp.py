"""DistributedDataParallel and fully_shard refuse a model that holds torchao's int8 weights, frozen as they are."""

import sys
import tempfile

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchao.quantization import Int8WeightOnlyConfig, quantize_

refused = 0
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=0, world_size=1)
    for wrap in (nn.parallel.DistributedDataParallel, lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (1,)))):
        model = nn.Sequential(nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 64))
        quantize_(model[0], Int8WeightOnlyConfig())
        try:
            wrap(model)
            print("wrapped")
        except NotImplementedError as error:
            refused += 1
            print(type(error).__name__, str(error).partition(", types")[0])
    dist.destroy_process_group()
sys.exit(0 if refused else 1)
