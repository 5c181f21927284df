"""One process of a composition: makes its part of the run, and leaves what it recorded in a file."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Raised, Unavailable
from kbitcheck.observe.composition.kinds import KINDS
from kbitcheck.observe.composition.steps import Run
from kbitcheck.observe.loaded import loaded_model
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes.snapshot import snapshot
from kbitcheck.observe.recipe import recipe_of_call, settled
from kbitcheck.observe.stages import Called
from kbitcheck.observe.unwatched.steps import imported

WAIT = timedelta(seconds=60)  # for another rank


def make_ready(job: Mapping[str, Any]) -> None:
    """Load the base, once for all processes of all its compositions."""
    _ = loaded_model(CaseSpec.from_json(job["spec"]))


def run(job: Mapping[str, Any], rank: int) -> int:
    """Do the part of one process; its exit code."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {}
    code = 0
    done: Run | None = None
    sys.path[:] = job["path"]
    try:
        kind = KINDS[job["kind"]]
        if len(kind.processes) > 1 and not kind.in_turn:
            _join(job, rank, len(kind.processes))
        done = kind(_preparation(job), rank, job["folder"], job["expects"])
        if job["fault"]:
            _function(job["fault"])(done)
        done.go()
        record = done.record
    except Unavailable as gap:
        record = {"unavailable": str(gap), "failed": gap.failed, "raised": gap.raised}
        code = int(gap.failed)
    except Exception as error:
        traceback.print_exc()
        record = {**(done.record if done is not None else {}), "raised": Raised.of(error)}
        code = 1
    record["ended"] = time.monotonic()
    torch.save(record, Path(job["folder"], f"{rank}.part"))
    Path(job["folder"], f"{rank}.part").rename(Path(job["folder"], f"{rank}.pt"))
    if dist.is_initialized() and not code:
        dist.barrier()
        dist.destroy_process_group()
    return code


def _join(job: Mapping[str, Any], rank: int, world: int) -> None:
    """Be one of several processes, as torchrun makes them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    met = Path(job["folder"], "met").as_uri()
    dist.init_process_group("gloo", init_method=met, rank=rank, world_size=world, timeout=WAIT)


def _preparation(job: Mapping[str, Any]) -> Preparation:
    spec = CaseSpec.from_json(job["spec"])
    loaded, function = loaded_model(spec), _function(job["function"])
    preparation = Preparation(spec, function, loaded)
    if spec.profile != "auto":
        return preparation
    called = Called(preparation)
    recipe = recipe_of_call(called.left, snapshot(called.left), loaded.facts)
    return Preparation(settled(spec, recipe), function, loaded)


def _function(place: Mapping[str, str]) -> Callable[..., Any]:
    if not place["file"]:
        function: Callable[..., Any] = getattr(import_module(place["module"]), place["attribute"])
        return function
    return imported(place["module"], place["file"], place["attribute"])
