"""DistributedDataParallel and FSDP2 on two processes."""

from collections.abc import Mapping

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kbitcheck.observe.blockwise.record import outermost_blocks
from kbitcheck.observe.composition.steps import RANKS, Run


class InDDP(Run):
    """Steps under DistributedDataParallel, wrapped as transformers' Trainer wraps."""

    processes, expects = RANKS, "mean"

    def wrap(self, model: nn.Module, adapters: Mapping[str, nn.Parameter]) -> nn.Module:
        """The model under DistributedDataParallel. Unused parameters are looked for where nothing is checkpointed."""
        checkpointed = any(getattr(m, "gradient_checkpointing", False) is True for m in model.modules())
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=not checkpointed)


class InFSDP2(Run):
    """Steps of a model whose blocks, and the rest of it, are units of ``fully_shard``."""

    processes, expects = RANKS, "mean"

    def wrap(self, model: nn.Module, adapters: Mapping[str, nn.Parameter]) -> nn.Module:
        """The model in units. What is packed in integers stays whole on each rank, as accelerate leaves it."""
        mesh = init_device_mesh("cpu", (len(RANKS),))
        ignored = self.ignored(model)
        units = {name: model.get_submodule(name) for name in outermost_blocks(model)}
        units["the rest of the model"] = model
        seen = {id(p) for p in ignored}
        sizes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        for name, unit in units.items():
            own = [p for p in unit.parameters() if id(p) not in seen]
            seen |= {id(p) for p in own}
            sizes[name] = _dtypes([p for p in own if p.requires_grad]), _dtypes([p for p in own if not p.requires_grad])
        self.record["units"] = sizes
        for unit in units.values():
            fully_shard(unit, mesh=mesh, ignored_params=ignored)
        sharded = {n for n, p in model.named_parameters() if isinstance(p, DTensor)}
        self.record["outside"] = [name for name in adapters if name not in sharded]
        return model

    def ignored(self, model: nn.Module) -> set[nn.Parameter]:
        """The parameters that no unit divides."""
        return {p for p in model.parameters() if not p.is_floating_point()}


def _dtypes(parameters: list[nn.Parameter]) -> tuple[str, ...]:
    return tuple(sorted({str(p.dtype).removeprefix("torch.") for p in parameters if p.is_floating_point()}))
