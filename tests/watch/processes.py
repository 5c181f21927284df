"""A script for ``torchrun``: two processes train one quantized model, under DDP or sharded by FSDP2 or FSDP1."""

import sys

import torch
import torch.distributed as dist
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import BitsAndBytesConfig

from tests.watch import runs


def replicated():
    arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model = get_peft_model(prepare_model_for_kbit_training(runs.load(), **arguments), runs.lora())
    dist.init_process_group("gloo")
    return nn.parallel.DistributedDataParallel(model)


def in_one_dtype():
    """Packed weights too, as FSDP needs it."""
    stored = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )  # fmt: skip
    model = get_peft_model(runs.load(quantization=stored).requires_grad_(False), runs.lora())
    for parameter in runs.trained_by(model):
        parameter.data = parameter.data.bfloat16()
    dist.init_process_group("gloo")
    return model


def sharded():
    model = in_one_dtype()
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def flattened():
    model = in_one_dtype()

    def policy(module, recurse, nonwrapped_numel):
        return recurse or getattr(getattr(module, "weight", None), "requires_grad", False)

    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))


if __name__ == "__main__":
    torch.manual_seed(5)
    model = {"ddp": replicated, "fsdp": sharded, "fsdp1": flattened}[sys.argv[1]]()
    optimizer = runs.adamw(model, 0.0 if "rate_zero" in sys.argv else 1e-3)
    model.train()
    for number, batch in enumerate(runs.batches(8)):
        if number % 2 == dist.get_rank():
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"rank {dist.get_rank()}: {loss.item()!r}", flush=True)
    dist.destroy_process_group()
