"""A script for ``torchrun``: two processes train one model after another, and write to the folder in ``sys.argv`` what each holds."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import kbitcheck
from tests.watch import processes, runs

RUNS = ("ddp", "fsdp", "left_out", "added", "ddp skips")

if __name__ == "__main__":
    held = {}
    # Once ranks have joined, one of them alone saves a model.
    bases = {run: runs.load(quantization=processes.STORED if run == "fsdp" else None) for run in RUNS}
    for run in RUNS:
        kind, *wrong = run.split()
        torch.manual_seed(5)
        runs.load = lambda run=run, **options: bases.pop(run)
        model = processes.KINDS[kind]()
        optimizer = runs.adamw(model)
        with kbitcheck.watch(model, optimizer, steps=2, select=["KB728"]) as watched:
            for _ in processes.train(model, optimizer, *wrong):
                pass
        held[run] = watched.replicas
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(held))
    dist.destroy_process_group()
