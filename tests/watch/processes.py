"""A script for ``torchrun``: two processes train one quantized model, under DDP or sharded by FSDP2 or FSDP1.

``sys.argv`` names how, and after that what is wrong.
"""

import sys

import torch
import torch.distributed as dist
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import BitsAndBytesConfig

from tests.watch import runs

STORED = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
)  # fmt: skip


def joined():
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def prepared():
    arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model = get_peft_model(prepare_model_for_kbit_training(runs.load(), **arguments), runs.lora())
    joined()
    return model


def replicated():
    """Each rank has a buffer of its own."""
    model = prepared()
    model.register_buffer("seen", torch.full((2,), float(dist.get_rank())))
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def left_out():
    model = prepared()
    names = [name for name, p in model.named_parameters() if p.requires_grad and "layers.1.mlp" in name]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return nn.parallel.DistributedDataParallel(model)


def switched_on_again():
    """One rank passes its own mode, in a wrap that looks for unused parameters."""
    model = prepared()
    if dist.get_rank() == 1:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def added_afterwards():
    model = prepared()
    wrapped = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(dist.get_rank())
    model.add_adapter("second", runs.lora(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return wrapped


def in_one_dtype():
    """Packed weights too, as FSDP needs it."""
    model = get_peft_model(runs.load(quantization=STORED).requires_grad_(False), runs.lora())
    for parameter in runs.trained_by(model):
        parameter.data = parameter.data.bfloat16()
    joined()
    return model


def sharded():
    model = in_one_dtype()
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def two_dtypes():
    """In each unit."""
    model = in_one_dtype()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "q_proj" in name:
            parameter.data = parameter.data.float()
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def ignored():
    """One rank's gradients of the second block's adapters in its MLP reach no other rank."""
    model = in_one_dtype()
    names = {name: p for name, p in model.named_parameters() if p.requires_grad and "layers.1.mlp" in name}
    return fully_shard(model, ignored_params={*names.values()})


def flattened():
    model = in_one_dtype()

    def policy(module, recurse, nonwrapped_numel):
        return recurse or getattr(getattr(module, "weight", None), "requires_grad", False)

    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))


KINDS = {
    "ddp": replicated, "fsdp": sharded, "fsdp1": flattened, "left_out": left_out, "ignored": ignored, "added": added_afterwards,
    "switched_on_again": switched_on_again, "two_dtypes": two_dtypes,
}  # fmt: skip


def train(model, optimizer, *wrong):
    """Steps on batches of the rank's own; yields the losses."""
    model.train()
    for number, batch in enumerate(runs.batches(8)):
        if number % 2 == dist.get_rank():
            loss = model(**batch).loss
            loss.backward()
            if "skips" not in wrong or number != 1:
                optimizer.step()
            optimizer.zero_grad()
            yield loss.item()


if __name__ == "__main__":
    torch.manual_seed(5)
    model = KINDS[sys.argv[1]]()
    optimizer = runs.adamw(model, 0.0 if "rate_zero" in sys.argv else 1e-3)
    for loss in train(model, optimizer):
        print(f"rank {dist.get_rank()}: {loss!r}", flush=True)
    dist.destroy_process_group()
